"""Receive, inspect and send the files of requests and results."""
