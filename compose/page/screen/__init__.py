"""The parts of the screen, in Streamlit: one module for each."""
