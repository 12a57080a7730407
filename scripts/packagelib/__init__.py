"""What scripts/package does: ``deb`` (a Debian package), ``wheels`` (sdist and wheel), ``roots`` (file systems of
other releases), ``trial`` (packages and the container image, installed and used there).

1. Only the standard library is used: a package is built on a system that has nothing else yet.
"""
