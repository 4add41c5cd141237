/* Makes chosen file operations under one folder fail, and keeps beside it what a power cut would leave of that folder.

   Loaded with LD_PRELOAD. Everything is asked of the environment at each call, so a process may change its mind:

   FAIL_IO_FOLDER   only files under it count
   FAIL_IO_CALLS    which calls count: "write" (half of the bytes are written, then it fails), "sync" or "name"
   FAIL_IO_K        the k-th of these calls fails; 0 or nothing for none
   FAIL_IO_FOR_EVER "1": every later one fails, too
   FAIL_IO_ERRNO    with this error
   FAIL_IO_MARK     a file that gets one line for each call that failed
   FAIL_IO_DISK     a folder that holds what was fsynced: bytes go there at a successful fsync of their file, what was renamed or
                    deleted at one of its folder. As on Linux, bytes whose fsync failed are never written unless they are written again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH 512
#define RECORDS 8192
#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

typedef struct { enum { WRITTEN, CUT, MOVED, GONE } kind; char path[PATH], from[PATH]; off_t at; size_t length; } record;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { int count; record all[RECORDS]; } *pending; /* in a file beside the disk's folder, because it outlives a process */
static long counted;

static const char *told(const char *name) { const char *value = getenv(name); return value ? value : ""; }

static int inside(const char *path) {
    size_t length = strlen(told("FAIL_IO_FOLDER"));
    return length && !strncmp(path, told("FAIL_IO_FOLDER"), length) && (path[length] == '/' || !path[length]);
}

static int ours(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = *told("FAIL_IO_FOLDER") ? readlink(link, path, PATH - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static int fails(const char *calls, const char *path) {
    if (strcmp(calls, told("FAIL_IO_CALLS"))) return 0;
    long k = atol(told("FAIL_IO_K"));
    counted++;
    if (!k || counted < k || (counted > k && strcmp(told("FAIL_IO_FOR_EVER"), "1"))) return 0;
    char line[PATH + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", counted, calls, path);
    int mark = open(told("FAIL_IO_MARK"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (mark < 0 || REAL(ssize_t, "write", int, const void *, size_t)(mark, line, length) != length) abort();
    close(mark);
    return atoi(told("FAIL_IO_ERRNO"));
}

static int keeps(void) {
    char file[PATH];
    if (!*told("FAIL_IO_DISK") || pending) return !!pending;
    snprintf(file, sizeof file, "%s.pending", told("FAIL_IO_DISK"));
    int to = open(file, O_RDWR | O_CREAT, 0600);
    if (REAL(int, "ftruncate64", int, off64_t)(to, sizeof *pending)) abort();
    pending = mmap(NULL, sizeof *pending, PROT_READ | PROT_WRITE, MAP_SHARED, to, 0);
    if (pending == MAP_FAILED) abort();
    close(to);
    return 1;
}

static void note(int kind, const char *path, const char *from, off_t at, size_t length) {
    if (!keeps()) return;
    if (pending->count == RECORDS) abort();
    record *new = &pending->all[pending->count++];
    new->kind = kind, new->at = at, new->length = length;
    strcpy(new->path, path), strcpy(new->from, from);
}

static int on_disk(const char *path, char *there) {
    snprintf(there, 2 * PATH, "%s%s", told("FAIL_IO_DISK"), path + strlen(told("FAIL_IO_FOLDER")));
    for (char *slash = there + 1; (slash = strchr(slash, '/')); slash++) *slash = 0, mkdir(there, 0700), *slash = '/';
    return open(there, O_WRONLY | O_CREAT, 0600);
}

static void reach_disk(const record *what) {
    char there[2 * PATH], from[2 * PATH];
    if (what->kind >= MOVED) close(on_disk(what->path, there)), REAL(int, "unlink", const char *)(there);
    if (what->kind == GONE) return;
    if (what->kind == MOVED) {
        snprintf(from, sizeof from, "%s%s", told("FAIL_IO_DISK"), what->from + strlen(told("FAIL_IO_FOLDER")));
        if (REAL(int, "rename", const char *, const char *)(from, there)) perror("the disk's rename");
        return;
    }
    int to = on_disk(what->path, there), in = open(what->path, O_RDONLY);
    if (what->kind == CUT) {
        if (REAL(int, "ftruncate64", int, off64_t)(to, what->at)) abort();
    } else {
        char *bytes = malloc(what->length);
        ssize_t length = pread(in, bytes, what->length, what->at);
        if (length > 0 && REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(to, bytes, length, what->at) != length) abort();
        free(bytes);
    }
    close(to), close(in);
}

static ssize_t put(int fd, const void *bytes, size_t length, off_t at) {
    char path[PATH];
    int here = ours(fd, path), moves = at < 0;
    if (here) pthread_mutex_lock(&lock);
    int error = here ? fails("write", path) : 0;
    size_t some = error ? length / 2 : length;
    if (moves && here) at = lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    ssize_t done = moves ? REAL(ssize_t, "write", int, const void *, size_t)(fd, bytes, some)
                         : REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(fd, bytes, some, at);
    int why = errno;
    if (here && done > 0) note(WRITTEN, path, "", at, done);
    if (here) pthread_mutex_unlock(&lock);
    errno = error ? error : why;
    return error ? -1 : done;
}

static int settle(int fd, const char *name) {
    char path[PATH], there[2 * PATH], folder[PATH];
    if (!ours(fd, path)) return REAL(int, name, int)(fd);
    pthread_mutex_lock(&lock);
    int error = fails("sync", path), kept = 0;
    if (!error && REAL(int, name, int)(fd)) error = errno;
    for (int i = 0; keeps() && i < pending->count; i++) {
        record *one = &pending->all[i];
        strcpy(folder, one->path);
        if (one->kind >= MOVED) *strrchr(folder, '/') = 0;
        int about = !strcmp(folder, path) || (one->kind == GONE && !strcmp(one->path, path));
        if (about && !error) reach_disk(one);
        if (!about || (error && one->kind >= MOVED)) pending->all[kept++] = *one;
    }
    if (keeps()) pending->count = kept;
    struct stat what;
    if (!error && keeps() && !fstat(fd, &what) && S_ISREG(what.st_mode)) close(on_disk(path, there));
    pthread_mutex_unlock(&lock);
    errno = error;
    return error ? -1 : 0;
}

static int cut(int fd, off_t at) {
    char path[PATH];
    if (!ours(fd, path)) return REAL(int, "ftruncate64", int, off64_t)(fd, at);
    pthread_mutex_lock(&lock);
    int error = fails("write", path);
    int done = error ? -1 : REAL(int, "ftruncate64", int, off64_t)(fd, at);
    if (!done) note(CUT, path, "", at, 0);
    pthread_mutex_unlock(&lock);
    if (error) errno = error;
    return done;
}

static int named(const char *name, const char *from, const char *to) {
    pthread_mutex_lock(&lock);
    int error = inside(to) ? fails("name", to) : 0;
    int done = error ? -1 : REAL(int, name, const char *, const char *)(from, to);
    if (!done && inside(to) && !strcmp(name, "rename")) note(MOVED, to, from, 0, 0);
    pthread_mutex_unlock(&lock);
    if (error) errno = error;
    return done;
}

int unlink(const char *path) {
    pthread_mutex_lock(&lock);
    int done = REAL(int, "unlink", const char *)(path), kept = 0;
    if (!done && inside(path) && keeps()) {
        for (int i = 0; i < pending->count; i++)
            if (strcmp(pending->all[i].path, path) || pending->all[i].kind >= MOVED) pending->all[kept++] = pending->all[i];
        pending->count = kept;
        note(GONE, path, "", 0, 0);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *bytes, size_t length) { return put(fd, bytes, length, -1); }
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return put(fd, bytes, length, at); }
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) { return put(fd, bytes, length, at); }
int ftruncate(int fd, off_t at) { return cut(fd, at); }
int ftruncate64(int fd, off64_t at) { return cut(fd, at); }
int fsync(int fd) { return settle(fd, "fsync"); }
int fdatasync(int fd) { return settle(fd, "fdatasync"); }
int rename(const char *from, const char *to) { return named("rename", from, to); }
int link(const char *from, const char *to) { return named("link", from, to); }
