/* The least that a FUSE daemon can do: one file, disk.raw, whose bytes are those of another file.
 *
 * passthrough FILE MOUNTPOINT THREADS
 *
 * THREADS is 0 for the loop of one thread, 1 for the one of several. What is measured beside it is what qcowfuse adds
 * to the cost of FUSE itself. Built by scripts/bench limit.
 */
#define FUSE_USE_VERSION 35
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_INODE = 2, MAX_BYTES = 1 << 20 };

static const char NAME[] = "disk.raw";
static const double FOREVER = 3600.0;
static int served_fd;
static off_t served_size;
static _Thread_local char *space;

static int fill(fuse_ino_t inode, struct stat *attributes)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->st_ino = inode;
    attributes->st_uid = getuid();
    attributes->st_gid = getgid();
    if (inode == FUSE_ROOT_ID) {
        attributes->st_mode = S_IFDIR | 0700;
        attributes->st_nlink = 2;
    } else if (inode == FILE_INODE) {
        attributes->st_mode = S_IFREG | 0600;
        attributes->st_nlink = 1;
        attributes->st_size = served_size;
    } else {
        return ENOENT;
    }
    return 0;
}

static void do_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = {.ino = FILE_INODE, .attr_timeout = FOREVER, .entry_timeout = FOREVER};

    if (parent != FUSE_ROOT_ID || strcmp(name, NAME) != 0) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    fill(FILE_INODE, &entry.attr);
    fuse_reply_entry(request, &entry);
}

static void do_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    struct stat attributes;
    int error = fill(inode, &attributes);

    (void)info;
    if (error)
        fuse_reply_err(request, error);
    else
        fuse_reply_attr(request, &attributes, FOREVER);
}

static void do_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    if (inode != FILE_INODE) {
        fuse_reply_err(request, EISDIR);
        return;
    }
    info->keep_cache = 1;
    fuse_reply_open(request, info);
}

static void do_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info)
{
    ssize_t n_read;

    (void)inode;
    (void)info;
    if (space == NULL && (space = malloc(MAX_BYTES)) == NULL) {
        fuse_reply_err(request, ENOMEM);
        return;
    }
    n_read = pread(served_fd, space, size < MAX_BYTES ? size : MAX_BYTES, offset);
    if (n_read < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_buf(request, space, (size_t)n_read);
}

static void do_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *info)
{
    ssize_t n_written = pwrite(served_fd, data, size, offset);

    (void)inode;
    (void)info;
    if (n_written < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_write(request, (size_t)n_written);
}

static void do_fsync(fuse_req_t request, fuse_ino_t inode, int datasync, struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    fuse_reply_err(request, (datasync ? fdatasync(served_fd) : fsync(served_fd)) ? errno : 0);
}

static const struct fuse_lowlevel_ops OPERATIONS = {
    .lookup = do_lookup,
    .getattr = do_getattr,
    .open = do_open,
    .read = do_read,
    .write = do_write,
    .fsync = do_fsync,
};

int main(int argc, char **argv)
{
    struct fuse_args arguments = FUSE_ARGS_INIT(1, argv);
    struct fuse_session *session;
    struct fuse_loop_config config = {.clone_fd = 1, .max_idle_threads = 4};
    struct stat status;
    int failed = 1;

    if (argc != 4) {
        fprintf(stderr, "usage: passthrough FILE MOUNTPOINT THREADS\n");
        return 2;
    }
    served_fd = open(argv[1], O_RDWR | O_CLOEXEC);
    if (served_fd < 0 || fstat(served_fd, &status) < 0) {
        perror(argv[1]);
        return 1;
    }
    served_size = status.st_size;
    session = fuse_session_new(&arguments, &OPERATIONS, sizeof OPERATIONS, NULL);
    if (session == NULL)
        return 1;
    if (fuse_set_signal_handlers(session) == 0) {
        if (fuse_session_mount(session, argv[2]) == 0) {
            failed = atoi(argv[3]) ? fuse_session_loop_mt(session, &config) : fuse_session_loop(session);
            fuse_session_unmount(session);
        }
        fuse_remove_signal_handlers(session);
    }
    fuse_session_destroy(session);
    return failed != 0;
}
