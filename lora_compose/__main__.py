"""`python -m lora_compose` is `lora-compose`."""

from lora_compose.compose.cli import main

if __name__ == "__main__":
    main()
