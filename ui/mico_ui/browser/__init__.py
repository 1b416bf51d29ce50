"""The chat in a browser: a page of Gradio's, and its requests to the server."""
