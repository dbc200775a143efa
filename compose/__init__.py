"""What people use: files, command line, page, evaluation, training, and the playground."""
