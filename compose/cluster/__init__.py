"""Work that processes share by claims; on machines that share no folder, by workers on a Ray cluster."""
