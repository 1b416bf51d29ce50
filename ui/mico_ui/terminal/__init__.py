"""``mico-chat chat``: a conversation about media in a terminal."""
