"""Receive, store and serve the files of the studio's visitors, and filter the page's requests."""
