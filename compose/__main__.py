"""`python -m compose` is `lora-compose`."""

from compose.cli import main

if __name__ == "__main__":
    main()
