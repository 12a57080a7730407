"""One virtual disk as one file of FUSE: requests to calls of the disk, exceptions to error numbers.

Modules: ``operations`` (the requests of exactly one file), ``several_files`` (the files of partitions beside it),
``attributes`` (owner, mode and times), ``seeking`` (searches for data and holes), ``holes_at_once`` (what of that and
of punching holes need not wait), ``copying`` (copies between the files), ``writes_at_once`` (which writes need not,
and what no flush has covered yet), ``fsync_at_once`` (which fsync, close and stat need not), ``open_files`` (how
often it is open), ``sizes`` (the size of the file, and what the kernel believes of it), ``unsent_data`` (what the
kernel holds), ``errnos`` (exception to errno), ``failures`` (what the log says), ``request_gate`` (which worker is
served when), ``started`` (a request on its way to its handler), and the package ``libfuse`` (what pyfuse3 has no
public way for).
"""
