"""The playground: a small model with concepts and a judge, as it is used. How it is made is told in `recipe`."""
