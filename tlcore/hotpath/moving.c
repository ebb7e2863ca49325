/* Writing a part of many files into another file, hashed on its way through the processor's own cache, without the
 * interpreter's lock. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for pwrite */
#endif
#include "beneath.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define NOWHERE (-1)
#define MOST_AT_ONCE ((size_t)1 << 30)

/* `room` has `filled` bytes of the target from `base` on, which are still to be written. */
typedef struct {
    const tlcore_places *files;
    const tlcore_span *spans;
    char *kept, *room;
    unsigned char *digests;
    void *hash;
    int handle, error;
    size_t size, filled;
    int64_t base;
} moving;

/* Write what is in the room, which is empty then. */
static void put_all(moving *job)
{
    for (size_t done = 0; done < job->filled && !job->error;) {
        ssize_t count = pwrite(job->handle, job->room + done, job->filled - done, (off_t)(job->base + (int64_t)done));
        if (count > 0)
            done += (size_t)count;
        else if (count == 0 || errno != EINTR)
            job->error = count < 0 ? errno : EIO;
    }
    job->filled = 0;
}

/* Have the room, which is not full then, go on with this place of the target. */
static void begin_at(moving *job, int64_t at)
{
    if (at != job->base + (int64_t)job->filled || job->filled == job->size) {
        put_all(job);
        job->base = at;
    }
}

/* Read, hash and put the wanted part of an open file, and keep the rest; 0 or -1. */
static int move_parts(moving *job, const tlcore_span *one, int handle)
{
    char *kept = job->kept + one->kept;
    int64_t done = 0, wanted = one->end - one->begin;
    size_t before = (size_t)one->begin, behind = (size_t)(one->size - one->end);
    tlcore_hash_begin(job->hash);
    do {
        begin_at(job, one->at < 0 ? NOWHERE : one->at + done);
        size_t piece = job->size - job->filled;
        if ((int64_t)piece > wanted - done)
            piece = (size_t)(wanted - done);
        int whole = done + (int64_t)piece == wanted;
        struct iovec parts[] = {
            {kept, before}, {job->room + job->filled, piece}, {kept + one->begin, whole ? behind : 0}};
        if (tlcore_move_all(readv, handle, parts, 3, MOST_AT_ONCE))
            return -1;
        tlcore_hash_more(job->hash, job->room + job->filled, piece);
        done += (int64_t)piece;
        before = 0;
        if (one->at >= 0)
            job->filled += piece;
    } while (done < wanted && !job->error);
    return job->error ? -1 : 0;
}

/* How many files, from the first on, were moved. */
static Py_ssize_t move_files(moving *job)
{
    Py_ssize_t i = 0;
    for (; i < job->files->count && !job->error; i++) {
        struct stat state;
        int handle = tlcore_open_beneath(job->files->root, PyBytes_AsString(job->files->names[i]), &state);
        if (handle < 0)
            break;
        int moved = state.st_size == job->spans[i].size && move_parts(job, &job->spans[i], handle) == 0;
        close(handle);
        if (!moved)
            break;
        tlcore_hash_end(job->hash, job->digests + i * TLCORE_DIGEST_BYTES);
    }
    put_all(job);
    return i;
}

static PyObject *run_moving(moving *job)
{
    Py_ssize_t count = job->files->count, done;
    PyObject *digests = PyBytes_FromStringAndSize(NULL, count * TLCORE_DIGEST_BYTES), *found = NULL;
    job->hash = tlcore_hash_new();
    if (digests == NULL || job->hash == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
    } else {
        /* Nobody else has the new object yet. */
        job->digests = (unsigned char *)PyBytes_AsString(digests);
        Py_BEGIN_ALLOW_THREADS;
        done = move_files(job);
        Py_END_ALLOW_THREADS;
        errno = job->error;
        if (job->error)
            PyErr_SetFromErrno(PyExc_OSError);
        else
            found = PyBytes_FromStringAndSize((const char *)job->digests, done * TLCORE_DIGEST_BYTES);
    }
    if (job->hash != NULL)
        tlcore_hash_free(job->hash);
    Py_XDECREF(digests);
    return found;
}

static PyObject *move_payloads(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *found = NULL;
    Py_buffer raw, kept, room;
    tlcore_places files;
    moving job = {.files = &files};
    if (!PyArg_ParseTuple(args, "OOy*w*w*i:move_payloads", &directory, &names, &raw, &kept, &room, &job.handle))
        return NULL;
    job.kept = kept.buf;
    job.room = room.buf;
    job.size = (size_t)room.len;
    if (!tlcore_hashes_pieces()) {
        PyErr_SetString(PyExc_RuntimeError, "no hash function has been given to the extension");
    } else if (job.size == 0) {
        PyErr_SetString(PyExc_ValueError, "there is no room to read into");
    } else if (tlcore_take_places(directory, names, &files) == 0) {
        tlcore_span *spans = tlcore_checked_spans(&raw, files.count, kept.len, INT64_MAX);
        job.spans = spans;
        if (spans != NULL)
            found = run_moving(&job);
        PyMem_Free(spans);
        tlcore_release_places(&files);
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&kept);
    PyBuffer_Release(&room);
    return found;
}

static PyMethodDef functions[] = {
    {"move_payloads", move_payloads, METH_VARARGS,
     "Write a part of each file below a directory into an open file, keep the rest; its XXH3-128, as far as it can be."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_moving(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
