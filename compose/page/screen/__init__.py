"""The parts of the screen, in Streamlit. One module for each part, in the order in which one meets them."""
