"""The studio: a page over the server's API. Nothing is generated here; see ``web/`` for what the browser runs.

A click submits a durable job, and the page follows the server's events. So nothing is lost when the page is loaded
again or the server restarts.
"""
