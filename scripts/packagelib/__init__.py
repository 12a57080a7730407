"""What scripts/package does: ``deb`` (a Debian package), ``wheels`` (sdist and wheel), ``roots`` (file systems of
other releases), ``trial`` (packages, installed and used there), ``image`` (the container image, built and used).

1. Only the standard library is used: a package is built on a system that has nothing else yet.
"""
