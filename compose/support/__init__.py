"""What all the other folders share."""
