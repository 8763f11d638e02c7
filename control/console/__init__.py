"""The web console: pages for people, over the same stores as the API."""
