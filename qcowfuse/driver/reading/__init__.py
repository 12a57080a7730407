"""Guest data out of an image and its backing chain.

Modules: ``reader`` (fetching extents), ``chain_reader`` (a short way for small reads in deep chains),
``decompression`` (compressed clusters, decoded in runs and ahead) and ``decoded_cache`` (those that were decoded
lately).
"""
