"""The demo in the browser: a file a tab. It serves this computer only, and asks nothing of any other by itself."""
