// SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
// SPDX-License-Identifier: Apache-2.0
//
// Preloaded, it has the FAULT_WRITE-th write to a file below FAULT_BELOW fail with FAULT_ERROR, and all after it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long writes;

static int fails(int descriptor) {
    const char *below = getenv("FAULT_BELOW"), *number = getenv("FAULT_WRITE"), *error = getenv("FAULT_ERROR");
    if (!below || !number || !error) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, below, strlen(below)) || atomic_fetch_add(&writes, 1) + 1 < atol(number)) return 0;
    errno = !strcmp(error, "EIO") ? EIO : !strcmp(error, "EDQUOT") ? EDQUOT : ENOSPC;
    return 1;
}

ssize_t write(int descriptor, const void *bytes, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return fails(descriptor) ? -1 : real(descriptor, bytes, count);
}

ssize_t pwrite(int descriptor, const void *bytes, size_t count, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite");
    return fails(descriptor) ? -1 : real(descriptor, bytes, count, offset);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off64_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return fails(descriptor) ? -1 : real(descriptor, bytes, count, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    return fails(descriptor) ? -1 : real(descriptor, parts, count);
}
