/* Preloaded into a process: counts what it does to files under one directory, and stops it at the n-th of these
   operations, or lets them fail from then on. A write is stopped with half of its bytes written. Not armed, it only
   passes calls on. Built and armed by strikes.py. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char directory[PATH_MAX];
static long count, target; /* of operations: done so far, to be struck (0: none) */
static int error, trace = -1;
static pid_t armed; /* this process, not its forks */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* From now on: operations under a directory (a real path) count; the n-th kills, or fails with `error`, as do all
   that come after it. A descriptor to write their names to, or -1. */
void strike_arm(const char *under, long n, int fails_with, int names) {
    snprintf(directory, sizeof directory, "%s", under);
    count = 0, target = n, error = fails_with, trace = names, armed = getpid();
}

long strike_count(void) { return count; }

static int within(const char *path) {
    size_t length = strlen(directory);
    return !strncmp(path, directory, length) && (path[length] == '/' || !path[length]);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    if (descriptor == AT_FDCWD) return getcwd(path, PATH_MAX) != NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int is_own(int at, const char *path) {
    char whole[2 * PATH_MAX], base[PATH_MAX];
    if (armed != getpid() || !path) return 0;
    if (path[0] == '/') return within(path);
    if (!path_of(at, base)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return within(whole);
}

static int is_own_descriptor(int descriptor, char *path) {
    return armed == getpid() && path_of(descriptor, path) && within(path);
}

/* 0: go on; 1: fail with errno set; -1: do half of it, then die. */
static int reached(const char *operation, const char *path, int is_write) {
    pthread_mutex_lock(&lock);
    long now = ++count;
    if (trace >= 0) dprintf(trace, "%ld %s %s\n", now, operation, path ? path : "");
    pthread_mutex_unlock(&lock);
    if (!target || now < target) return 0;
    if (error) {
        errno = error;
        return 1;
    }
    if (is_write) return -1;
    kill(getpid(), SIGKILL);
    return -1;
}

/* Files that are opened to be written. */
#define WRITES (O_WRONLY | O_RDWR)
#define OPENS(name)                                                           \
    int name(const char *path, int flags, ...) {                              \
        static int (*real)(const char *, int, ...);                           \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;             \
        va_end(rest);                                                         \
        if (flags & WRITES && is_own(AT_FDCWD, path) && reached(#name, path, 0)) return -1; \
        return real(path, flags, mode);                                       \
    }
OPENS(open)
OPENS(open64)
#define OPENS_AT(name)                                                        \
    int name(int at, const char *path, int flags, ...) {                      \
        static int (*real)(int, const char *, int, ...);                      \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;             \
        va_end(rest);                                                         \
        if (flags & WRITES && is_own(at, path) && reached(#name, path, 0)) return -1; \
        return real(at, path, flags, mode);                                   \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

/* A write is half done when it is struck. */
ssize_t write(int descriptor, const void *bytes, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    char path[PATH_MAX];
    if (is_own_descriptor(descriptor, path)) {
        int due = reached("write", path, 1);
        if (due > 0) return -1;
        if (due < 0) {
            real(descriptor, bytes, size / 2);
            kill(getpid(), SIGKILL);
        }
    }
    return real(descriptor, bytes, size);
}

#define ON_DESCRIPTOR(type, name, parameters, values)                         \
    type name parameters {                                                    \
        static type(*real) parameters;                                        \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);        \
        char path[PATH_MAX];                                                  \
        if (is_own_descriptor(descriptor, path) && reached(#name, path, 0)) return -1; \
        return real values;                                                   \
    }
ON_DESCRIPTOR(ssize_t, writev, (int descriptor, const struct iovec *parts, int number), (descriptor, parts, number))
ON_DESCRIPTOR(ssize_t, sendfile, (int descriptor, int from, off_t *at, size_t size), (descriptor, from, at, size))
ON_DESCRIPTOR(ssize_t, sendfile64, (int descriptor, int from, off64_t *at, size_t size), (descriptor, from, at, size))
ON_DESCRIPTOR(int, fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size))

#define ON_PATH(name, parameters, values, at, path)                           \
    int name parameters {                                                     \
        static int (*real) parameters;                                        \
        if (!real) real = (int (*) parameters)dlsym(RTLD_NEXT, #name);        \
        if (is_own(at, path) && reached(#name, path, 0)) return -1;           \
        return real values;                                                   \
    }
ON_PATH(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
ON_PATH(renameat, (int at, const char *from, int there, const char *to), (at, from, there, to), there, to)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
ON_PATH(symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path)
ON_PATH(link, (const char *from, const char *path), (from, path), AT_FDCWD, path)
ON_PATH(truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path)
ON_PATH(truncate64, (const char *path, off64_t size), (path, size), AT_FDCWD, path)

/* What only takes away is done on a full disk too. */
#define REMOVES(name, parameters, values, at)                                 \
    int name parameters {                                                     \
        static int (*real) parameters;                                        \
        if (!real) real = (int (*) parameters)dlsym(RTLD_NEXT, #name);        \
        if (is_own(at, path) && error != ENOSPC && reached(#name, path, 0)) return -1; \
        return real values;                                                   \
    }
REMOVES(unlink, (const char *path), (path), AT_FDCWD)
REMOVES(unlinkat, (int at, const char *path, int flags), (at, path, flags), at)
REMOVES(rmdir, (const char *path), (path), AT_FDCWD)
