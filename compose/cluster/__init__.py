"""Work on machines that share no folder: the files that they need, and workers on a Ray cluster."""
