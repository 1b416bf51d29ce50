"""User interfaces that talk to a MiCo-Chat server over HTTP; they know nothing of the model."""
