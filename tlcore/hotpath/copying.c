/* Copying and writing many pieces of memory in one call. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for O_DIRECT */
#endif
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* Few calls, and each ends soon enough for Ctrl-C. Of a write of 2 MiB or more Linux wants that much memory in one piece
 * for a file's pages. Where memory is in pieces, as it is on a machine that has run for hours, it has to be put together
 * first: such writes to ext4 took 1 to 8 times the processor time of those just below, which took 0.9 times that of 128 KiB. */
#define WRITE_BYTES (1984 << 10)
#define WRITE_PARTS 1024
/* What goes past the page cache goes in whole blocks, from memory that begins with one, so it is put together first. In
 * writes of 2 to 4 MiB 13 MB take 2 to 3 ms of processor time with that, and 8 or more through the cache, whose pages are
 * new. A decode step of a whole model is to need no more than four calls. */
#define BLOCK_BYTES 4096
#define DIRECT_BYTES (3 << 20)

Py_ssize_t tlcore_size(PyObject *number, Py_ssize_t most, const char *what)
{
    Py_ssize_t size = PyNumber_AsSsize_t(number, PyExc_OverflowError);
    if (size == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
    }
    if (size < 0 || size > most) {
        PyErr_Format(PyExc_ValueError, "%s: %R is not in [0, %zd]", what, number, most);
        return -1;
    }
    return size;
}

typedef struct {
    PyObject *parts;
    Py_buffer *views; /* as many as are held */
    Py_ssize_t held;
    struct iovec *spans;
    Py_ssize_t count;
    Py_ssize_t bytes;
} pieces;

static void release_pieces(pieces *all)
{
    for (Py_ssize_t i = 0; i < all->held; i++)
        PyBuffer_Release(&all->views[i]);
    PyMem_Free(all->views);
    PyMem_Free(all->spans);
    Py_CLEAR(all->parts);
}

static void add_span(pieces *all, void *data, Py_ssize_t size)
{
    all->spans[all->count].iov_base = data;
    all->spans[all->count++].iov_len = (size_t)size;
    all->bytes += size;
}

/* The parts' memory, held until `release_pieces`; -1 with an exception set and nothing held. */
static int take_pieces(PyObject *sequence, pieces *all)
{
    memset(all, 0, sizeof *all);
    all->parts = PySequence_Tuple(sequence);
    if (all->parts == NULL)
        return -1;
    Py_ssize_t count = PyTuple_Size(all->parts);
    all->views = PyMem_Calloc((size_t)count + 1, sizeof *all->views);
    all->spans = PyMem_Calloc((size_t)count + 1, sizeof *all->spans);
    if (all->views == NULL || all->spans == NULL) {
        PyErr_NoMemory();
        release_pieces(all);
        return -1;
    }
    for (; all->held < count; all->held++) {
        Py_buffer *view = &all->views[all->held];
        if (PyObject_GetBuffer(PyTuple_GetItem(all->parts, all->held), view, PyBUF_SIMPLE)) {
            release_pieces(all);
            return -1;
        }
        add_span(all, view->buf, view->len);
    }
    return 0;
}

/* The same of pieces that begin at addresses, in memory that the caller holds. */
static int take_places(const Py_buffer *addresses, const Py_buffer *sizes, pieces *all)
{
    memset(all, 0, sizeof *all);
    Py_ssize_t count = addresses->len / (Py_ssize_t)sizeof(int64_t);
    const int64_t *address = addresses->buf, *size = sizes->buf;
    if (sizes->len != addresses->len || addresses->len % (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "as many sizes as addresses are needed, 64 bits each");
        return -1;
    }
    all->spans = PyMem_Calloc((size_t)count + 1, sizeof *all->spans);
    if (all->spans == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (size[i] < 0) {
            PyErr_Format(PyExc_ValueError, "piece %zd has a negative size", i);
            release_pieces(all);
            return -1;
        }
        add_span(all, (void *)(uintptr_t)address[i], (Py_ssize_t)size[i]);
    }
    return 0;
}

static void copy_pieces(char *target, const Py_ssize_t *offsets, const pieces *all)
{
    for (Py_ssize_t i = 0; i < all->count; i++)
        if (all->spans[i].iov_len)
            memmove(target + offsets[i], all->spans[i].iov_base, all->spans[i].iov_len);
}

/* Where each piece goes, checked; NULL with an exception set. */
static Py_ssize_t *checked_offsets(PyObject *sequence, const pieces *all, Py_ssize_t room)
{
    if (PySequence_Size(sequence) != all->count) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%zd parts need as many offsets", all->count);
        return NULL;
    }
    Py_ssize_t *offsets = PyMem_Calloc((size_t)all->count + 1, sizeof *offsets);
    if (offsets == NULL)
        return (Py_ssize_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < all->count; i++) {
        PyObject *number = PySequence_GetItem(sequence, i);
        Py_ssize_t most = room - (Py_ssize_t)all->spans[i].iov_len;
        offsets[i] = number == NULL ? -1 : tlcore_size(number, most, "offset of a part");
        Py_XDECREF(number);
        if (offsets[i] < 0) {
            PyMem_Free(offsets);
            return NULL;
        }
    }
    return offsets;
}

static PyObject *gather(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer target;
    PyObject *where, *parts;
    pieces all;
    if (!PyArg_ParseTuple(args, "w*OO:gather", &target, &where, &parts))
        return NULL;
    if (take_pieces(parts, &all)) {
        PyBuffer_Release(&target);
        return NULL;
    }
    Py_ssize_t *offsets = checked_offsets(where, &all, target.len);
    PyObject *done = offsets == NULL ? NULL : Py_None;
    if (offsets != NULL && all.bytes < TLCORE_SMALL_BYTES) {
        copy_pieces(target.buf, offsets, &all);
    } else if (offsets != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        copy_pieces(target.buf, offsets, &all);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(offsets);
    release_pieces(&all);
    PyBuffer_Release(&target);
    Py_XINCREF(done);
    return done;
}

/* Fill `group` from the pieces behind (`piece`, `done`), at most WRITE_BYTES; how many parts it has. */
static int next_group(const pieces *all, Py_ssize_t piece, Py_ssize_t done, struct iovec *group,
                      Py_ssize_t *bytes)
{
    int parts = 0;
    Py_ssize_t room = WRITE_BYTES;
    for (; piece < all->count && parts < WRITE_PARTS && room; piece++, done = 0) {
        Py_ssize_t size = (Py_ssize_t)all->spans[piece].iov_len - done;
        if (size <= 0)
            continue;
        group[parts].iov_base = (char *)all->spans[piece].iov_base + done;
        group[parts].iov_len = (size_t)(size < room ? size : room);
        room -= (Py_ssize_t)group[parts++].iov_len;
    }
    *bytes = WRITE_BYTES - room;
    return parts;
}

/* Move (`piece`, `done`) behind the bytes just written. */
static void pass_over(const pieces *all, Py_ssize_t written, Py_ssize_t *piece, Py_ssize_t *done)
{
    while (*piece < all->count && *done + written >= (Py_ssize_t)all->spans[*piece].iov_len) {
        written -= (Py_ssize_t)all->spans[*piece].iov_len - *done;
        ++*piece;
        *done = 0;
    }
    *done += written;
}

/* Write what is left of the pieces; 0 or the system's error, EINTR also where it took less than it was given. */
static int write_pieces(int handle, const pieces *all, Py_ssize_t *piece, Py_ssize_t *done)
{
    struct iovec group[WRITE_PARTS];
    Py_ssize_t bytes;
    int parts;
    while ((parts = next_group(all, *piece, *done, group, &bytes))) {
        ssize_t written = writev(handle, group, parts);
        if (written < 0)
            return errno;
        pass_over(all, written, piece, done);
        if (written < bytes)
            return EINTR;
    }
    return 0;
}

/* Copy up to `most` bytes from (`piece`, `done`) on; how many there were. */
static size_t copy_ahead(const pieces *all, Py_ssize_t piece, Py_ssize_t done, char *room, size_t most)
{
    size_t filled = 0;
    for (; piece < all->count && filled < most; piece++, done = 0) {
        size_t left = all->spans[piece].iov_len - (size_t)done, size = left < most - filled ? left : most - filled;
        if (size)
            memcpy(room + filled, (const char *)all->spans[piece].iov_base + done, size);
        filled += size;
    }
    return filled;
}

/* Write up to `most` bytes from `room`, in one call. As `write_pieces`, and -1 where there was less than a block. */
static int write_copied(int handle, const pieces *all, Py_ssize_t *piece, Py_ssize_t *done, char *room,
                        size_t most, size_t block)
{
    size_t size = copy_ahead(all, *piece, *done, room, most) / block * block;
    if (size == 0)
        return -1;
    ssize_t written = write(handle, room, size);
    if (written < 0)
        return errno;
    pass_over(all, written, piece, done);
    return (size_t)written < size ? EINTR : 0;
}

/* Write all but what is no whole block, past the page cache. As `write_pieces`; 0, too, where this cannot be done here. */
static int write_direct(int handle, const pieces *all, Py_ssize_t *piece, Py_ssize_t *done, char *room)
{
#ifdef O_DIRECT
    off_t at = lseek(handle, 0, SEEK_CUR);
    int flags = fcntl(handle, F_GETFL), error = 0;
    if (at < 0 || flags < 0)
        return 0;
    size_t lead = (size_t)(-at & (BLOCK_BYTES - 1));
    if (lead && (error = write_copied(handle, all, piece, done, room, lead, 1)) != 0)
        return error < 0 ? 0 : error;
    if (fcntl(handle, F_SETFL, flags | O_DIRECT))
        return 0;
    while ((error = write_copied(handle, all, piece, done, room, DIRECT_BYTES, BLOCK_BYTES)) == 0)
        ;
    /* What it refuses is written like anything else. */
    if (error < 0 || error == EINVAL || error == EOPNOTSUPP)
        error = 0;
    return fcntl(handle, F_SETFL, flags) ? errno : error;
#else
    (void)handle, (void)all, (void)piece, (void)done, (void)room;
    return 0;
#endif
}

/* One that was used before: its pages are there. Whoever has the interpreter's lock may take it, and gives one back. */
static char *spare_room;

static char *take_room(void)
{
    void *room = spare_room;
    spare_room = NULL;
    return room != NULL || posix_memalign(&room, BLOCK_BYTES, DIRECT_BYTES) == 0 ? room : NULL;
}

static void give_room_back(char *room)
{
    if (spare_room == NULL)
        spare_room = room;
    else
        free(room);
}

/* Write them all and release them; the bytes written, or NULL with an exception set. */
static PyObject *written(int handle, pieces *all, Py_ssize_t direct_from)
{
    int error, stopped = 0;
    Py_ssize_t piece = 0, done = 0;
    char *room = direct_from >= 0 && all->bytes >= direct_from ? take_room() : NULL;
    do {
        Py_BEGIN_ALLOW_THREADS;
        error = room == NULL ? 0 : write_direct(handle, all, &piece, &done, room);
        if (error == 0)
            error = write_pieces(handle, all, &piece, &done);
        Py_END_ALLOW_THREADS;
        /* A signal's handler may want to end this; a signal also cuts a write short. */
        stopped = error == EINTR && PyErr_CheckSignals();
    } while (error == EINTR && !stopped);
    Py_ssize_t bytes = all->bytes;
    release_pieces(all);
    if (room != NULL)
        give_room_back(room);
    if (stopped)
        return NULL;
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(bytes);
}

static PyObject *write_all(PyObject *module, PyObject *args)
{
    (void)module;
    int handle;
    PyObject *parts;
    pieces all;
    Py_ssize_t direct_from = -1;
    if (!PyArg_ParseTuple(args, "iO|n:write_all", &handle, &parts, &direct_from) || take_pieces(parts, &all))
        return NULL;
    return written(handle, &all, direct_from);
}

static PyObject *write_places(PyObject *module, PyObject *args)
{
    (void)module;
    int handle;
    Py_buffer addresses, sizes;
    pieces all;
    Py_ssize_t direct_from = -1;
    if (!PyArg_ParseTuple(args, "iy*y*|n:write_places", &handle, &addresses, &sizes, &direct_from))
        return NULL;
    int failed = take_places(&addresses, &sizes, &all);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    return failed ? NULL : written(handle, &all, direct_from);
}

static PyMethodDef functions[] = {
    {"gather", gather, METH_VARARGS, "Copy each part to its offset in a buffer."},
    {"write_all", write_all, METH_VARARGS, "Write every part in order, many past the page cache; returns the bytes written."},
    {"write_places", write_places, METH_VARARGS, "The same of parts told by their addresses and sizes, 64 bits each."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_copying(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
