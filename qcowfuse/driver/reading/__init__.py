"""Guest data out of an image and its backing chain.

Modules: ``requests`` (reads as they are started, by kind of disk), ``reader`` (look up, then fetch), ``fetching``
(extents that are not compressed), ``quick_reader`` (a short way for small reads in deep chains), ``compressed`` (the
door to compressed clusters), ``decompression`` (those that are decoded), ``decoding`` (the work on them), ``demand``
(single ones that several reads want), ``read_ahead`` and ``decoded_cache`` (those that were decoded lately).
"""
