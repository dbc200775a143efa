"""The page in the browser. Everything except `screen` works without Streamlit."""
