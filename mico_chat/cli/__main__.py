"""`python -m mico_chat.cli`."""

from mico_chat.cli.main import main

if __name__ == "__main__":
    main()
