"""The FUSE side: one image served as one file. pyfuse3 lives here and nowhere else.

Modules: ``mount`` (the life of the daemon, from opening to closing), ``ending`` (unmounted by hand, told to stop, cut
off), ``settings`` (where and how it serves), ``mount_session`` (the mount itself), ``operations`` (the FUSE
operations of exactly one file), ``extra_operations`` (fallocate and lseek), ``seeking`` (searches for data and
holes), ``sizes`` (the size of the file, and what the kernel believes of it), ``errnos`` (exception to errno),
``mountpoint`` (what may be a mount point, unmounting), ``mount_users`` (who uses it), ``served_file`` (calls on the
file that keep nobody from unmounting), ``outside`` (the process that asks the mount), ``mount_client`` (what it can
be asked for), ``process`` (daemon, report to the starter), ``poll_first`` (a cheaper wait for requests), ``at_once``
(a shorter way for what need not wait), ``session_hook`` and ``init_reply`` (the parameters of the FUSE connection
that pyfuse3 leaves alone), ``sandbox`` (what the daemon gives up once it serves).
"""
