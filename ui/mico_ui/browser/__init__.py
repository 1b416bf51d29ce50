"""The chat in a browser: a page of Gradio's, and what it asks of the server."""
