"""What the page in the browser needs besides a browser: everything here works without Streamlit but `screen`."""
