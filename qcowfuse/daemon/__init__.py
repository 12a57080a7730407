"""The life of the daemon: from an open disk to a mount that serves it, and to its end.

Modules: ``service`` (from opening to closing), ``session`` (the mount itself), ``settings`` (where and how it
serves), ``ending`` (unmounted by hand, told to stop, cut off), ``process`` (daemon, report to the starter),
``sandbox`` (what the daemon gives up once it serves), ``mountpoint`` (what may be a mount point, unmounting),
``fusermount`` (for users who are not root), ``mount_users`` (who uses it), ``record`` (what a daemon says where its
mount can't be asked), ``served_file`` (calls on the file that keep nobody from unmounting), ``outside`` (calls on the
mount, made by a process outside of it), ``outside_process`` (that process) and ``mount_client`` (what it can be asked
for). Only for some mounts: ``idle`` (unused for so long that it may go), ``metrics`` and ``metrics_process``
(counters for Prometheus).
"""
