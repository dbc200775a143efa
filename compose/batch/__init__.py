"""Many scenes and seeds to images: files and tables of scenes, what is to be made of them, and making it."""
