"""The `mico-chat` command: the only code that knows the server, the page and the training."""
