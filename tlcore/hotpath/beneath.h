/* Files below a directory, which no symbolic link leads to. */
#ifndef TLCORE_BENEATH_H
#define TLCORE_BENEATH_H

#include "native.h"

#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Read at a time: what the processor's own cache holds. */
#define TLCORE_PIECE_BYTES (256 << 10)

/* Names as the system takes them, and the directory that they are in. */
typedef struct {
    PyObject *directory;
    PyObject **names;
    Py_ssize_t count;
    int root; /* -1: there is no such directory, and nothing is found in it */
} tlcore_places;

/* -1 with an exception set and nothing held. */
int tlcore_take_places(PyObject *directory, PyObject *sequence, tlcore_places *all);
void tlcore_release_places(tlcore_places *all);

/* Whether it is a relative path whose parts are names. */
int tlcore_is_plain(const char *name);

/* A regular file and its state; -1 for all else, also where the kernel is too old to promise the way there. */
int tlcore_open_beneath(int root, const char *name, struct stat *state);

/* A directory, reached in the same way; -1 with errno set. */
int tlcore_open_directory(int root, const char *name);

/* Some of its entries, as the kernel writes them: how many bytes, 0 at the end, -1 for an error. */
long tlcore_read_entries(int handle, char *entries, size_t room);

/* Up to `most` bytes, fewer only at the file's end; -1 for an error. */
ssize_t tlcore_read_piece(int handle, char *target, size_t most);

/* Whether one file of exactly `bytes` bytes that lies directly in a directory was read; both names are bytes. It takes
 * half of the calls that the way by a handle of the directory does. */
int tlcore_read_directly(PyObject *directory, PyObject *name, char *target, Py_ssize_t bytes);

/* Have `move` (readv or writev) fill, or write, all parts, at most so many bytes a call; 0 or the system's error,
 * EIO also at a file's end. The parts are changed on the way. */
typedef ssize_t (*tlcore_mover)(int, const struct iovec *, int);
int tlcore_move_all(tlcore_mover move, int handle, struct iovec *parts, int count, size_t most);

/* A part of a file: the file's size, where the part begins and ends, where that goes (-1: nowhere), and where the rest
 * is kept. */
typedef struct {
    int64_t size, begin, end, at, kept;
} tlcore_span;
#define TLCORE_SPAN_NUMBERS 4
/* So many spans from their first four numbers, which leave `room` for the rests and end within `target`; to be given to
 * `PyMem_Free`, NULL with an exception set. */
tlcore_span *tlcore_checked_spans(const Py_buffer *raw, Py_ssize_t count, Py_ssize_t room, int64_t target);

#endif
