/* Reading and hashing many ranges of open files in one call without the interpreter's lock. */
#include "native.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    int64_t begin, end;
} range;

/* A buffer of ranges may begin anywhere in memory. */
static range range_at(const Py_buffer *ranges, Py_ssize_t i)
{
    range found;
    memcpy(&found, (const char *)ranges->buf + (size_t)i * sizeof found, sizeof found);
    return found;
}

static int check_ranges(const Py_buffer *ranges, Py_ssize_t count, Py_ssize_t room)
{
    if (ranges->len % (Py_ssize_t)sizeof(range)) {
        PyErr_SetString(PyExc_ValueError, "ranges are pairs of 64-bit integers");
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        range each = range_at(ranges, i);
        if (each.begin < 0 || each.end < each.begin || each.end - each.begin > room) {
            PyErr_Format(PyExc_ValueError, "range %zd: [%lld, %lld) is none of at most %zd bytes", i,
                         (long long)each.begin, (long long)each.end, room);
            return 0;
        }
    }
    return 1;
}

static int read_range(int handle, range wanted, char *target)
{
    while (wanted.begin < wanted.end) {
        ssize_t count = pread(handle, target, (size_t)(wanted.end - wanted.begin), (off_t)wanted.begin);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0;
        wanted.begin += count;
        target += count;
    }
    return 1;
}

/* Ranges that touch are read together, as far as the scratch holds them: hashing finds them in the cache. */
static Py_ssize_t hash_jobs(int handle, const Py_buffer *ranges, Py_ssize_t count, const Py_buffer *scratch,
                            unsigned char *digests)
{
    Py_ssize_t done = 0;
    while (done < count) {
        range whole = range_at(ranges, done);
        Py_ssize_t next = done + 1;
        for (; next < count; next++) {
            range more = range_at(ranges, next);
            if (more.begin != whole.end || more.end - whole.begin > scratch->len)
                break;
            whole.end = more.end;
        }
        if (!read_range(handle, whole, scratch->buf))
            break;
        for (; done < next; done++) {
            range each = range_at(ranges, done);
            const char *data = (const char *)scratch->buf + (each.begin - whole.begin);
            tlcore_digest(data, (size_t)(each.end - each.begin), digests + done * TLCORE_DIGEST_BYTES);
        }
    }
    return done;
}

/* A file that is open, and how many of the ranges are its own. */
typedef struct {
    int64_t handle, count;
} ranges_of_file;

static int check_files(const ranges_of_file *files, Py_ssize_t count, Py_ssize_t ranges)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        if (files[i].count < 0 || files[i].count > ranges) {
            PyErr_Format(PyExc_ValueError, "file %zd has %lld of %zd ranges", i, (long long)files[i].count, ranges);
            return 0;
        }
        ranges -= (Py_ssize_t)files[i].count;
    }
    if (ranges)
        PyErr_Format(PyExc_ValueError, "%zd ranges are no file's", ranges);
    return !ranges;
}

/* What is told of each file: the digests of its first ranges; they lie in `digests` as the ranges in theirs. */
static PyObject *digests_of(const ranges_of_file *files, Py_ssize_t count, const Py_ssize_t *done,
                            const unsigned char *digests)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *own = PyBytes_FromStringAndSize((const char *)digests, done[i] * TLCORE_DIGEST_BYTES);
        digests += files[i].count * TLCORE_DIGEST_BYTES;
        if (own == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, own);
    }
    return list;
}

static PyObject *hash_checked(const ranges_of_file *files, Py_ssize_t count, const Py_buffer *ranges,
                              const Py_buffer *scratch)
{
    Py_ssize_t total = ranges->len / (Py_ssize_t)sizeof(range);
    if (!tlcore_can_hash())
        return PyErr_Format(PyExc_RuntimeError, "no hash function has been given to the extension");
    if (!check_ranges(ranges, total, scratch->len) || !check_files(files, count, total))
        return NULL;
    Py_ssize_t *done = PyMem_Calloc((size_t)count + 1, sizeof *done);
    unsigned char *digests = PyMem_Calloc((size_t)total + 1, TLCORE_DIGEST_BYTES);
    PyObject *found = NULL;
    if (done == NULL || digests == NULL)
        PyErr_NoMemory();
    else {
        Py_BEGIN_ALLOW_THREADS;
        Py_buffer own = *ranges;
        unsigned char *target = digests;
        for (Py_ssize_t i = 0; i < count; i++) {
            int handle = files[i].handle == (int)files[i].handle ? (int)files[i].handle : -1;
            done[i] = hash_jobs(handle, &own, (Py_ssize_t)files[i].count, scratch, target);
            own.buf = (char *)own.buf + files[i].count * (int64_t)sizeof(range);
            target += files[i].count * TLCORE_DIGEST_BYTES;
        }
        Py_END_ALLOW_THREADS;
        found = digests_of(files, count, done, digests);
    }
    PyMem_Free(done);
    PyMem_Free(digests);
    return found;
}

static PyObject *hash_ranges(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer raw, ranges, scratch;
    PyObject *found = NULL;
    if (!PyArg_ParseTuple(args, "y*y*w*:hash_ranges", &raw, &ranges, &scratch))
        return NULL;
    Py_ssize_t count = raw.len / (Py_ssize_t)sizeof(ranges_of_file);
    /* Copied: they may begin anywhere in memory. */
    ranges_of_file *files = PyMem_Calloc((size_t)count + 1, sizeof *files);
    if (files == NULL)
        PyErr_NoMemory();
    else if (raw.len % (Py_ssize_t)sizeof(ranges_of_file))
        PyErr_SetString(PyExc_ValueError, "files and how many ranges they have are pairs of 64-bit integers");
    else {
        if (count)
            memcpy(files, raw.buf, (size_t)raw.len);
        found = hash_checked(files, count, &ranges, &scratch);
    }
    PyMem_Free(files);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&ranges);
    PyBuffer_Release(&scratch);
    return found;
}

/* A range of a file, and where it goes: -1, nowhere, it is only hashed. */
typedef struct {
    range from;
    int64_t at;
} placed;

static int check_placed(const placed *all, Py_ssize_t count, Py_ssize_t room)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        range from = all[i].from;
        if (from.begin < 0 || from.end < from.begin || from.end - from.begin > room || all[i].at < -1 ||
            all[i].at > room - (from.end - from.begin)) {
            PyErr_Format(PyExc_ValueError, "range %zd: [%lld, %lld), put at %lld, does not fit", i,
                         (long long)from.begin, (long long)from.end, (long long)all[i].at);
            return 0;
        }
    }
    return 1;
}

/* How many ranges, from the first on, were read. */
static Py_ssize_t read_placed(int handle, const placed *all, Py_ssize_t count, char *target, unsigned char *digests)
{
    char *spare = NULL;
    int64_t room = 0;
    Py_ssize_t done = 0;
    for (; done < count; done++) {
        int64_t size = all[done].from.end - all[done].from.begin;
        char *place = target + all[done].at;
        if (all[done].at < 0) {
            if (size >= room) {
                free(spare);
                room = size + 1;
                spare = malloc((size_t)room);
            }
            if (spare == NULL)
                break;
            place = spare;
        }
        if (!read_range(handle, all[done].from, place))
            break;
        tlcore_digest(place, (size_t)size, digests + done * TLCORE_DIGEST_BYTES);
    }
    free(spare);
    return done;
}

static PyObject *gather_checked(int handle, const Py_buffer *raw, const Py_buffer *target)
{
    Py_ssize_t count = raw->len / (Py_ssize_t)sizeof(placed), done;
    if (!tlcore_can_hash())
        return PyErr_Format(PyExc_RuntimeError, "no hash function has been given to the extension");
    if (raw->len % (Py_ssize_t)sizeof(placed))
        return PyErr_Format(PyExc_ValueError, "ranges with their places are three 64-bit integers");
    placed *all = PyMem_Calloc((size_t)count + 1, sizeof *all);
    PyObject *found = all == NULL ? PyErr_NoMemory() : PyBytes_FromStringAndSize(NULL, count * TLCORE_DIGEST_BYTES);
    if (found != NULL && count)
        memcpy(all, raw->buf, (size_t)raw->len);
    if (found != NULL && !check_placed(all, count, target->len))
        Py_CLEAR(found);
    if (found != NULL) {
        /* Nobody else has the new object yet. */
        unsigned char *digests = (unsigned char *)PyBytes_AsString(found);
        Py_BEGIN_ALLOW_THREADS;
        done = read_placed(handle, all, count, target->buf, digests);
        Py_END_ALLOW_THREADS;
        if (done < count) {
            PyObject *less = PyBytes_FromStringAndSize((const char *)digests, done * TLCORE_DIGEST_BYTES);
            Py_DECREF(found);
            found = less;
        }
    }
    PyMem_Free(all);
    return found;
}

static PyObject *gather_ranges(PyObject *module, PyObject *args)
{
    (void)module;
    int handle;
    Py_buffer raw, target;
    if (!PyArg_ParseTuple(args, "iy*w*:gather_ranges", &handle, &raw, &target))
        return NULL;
    PyObject *found = gather_checked(handle, &raw, &target);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&target);
    return found;
}

static PyMethodDef functions[] = {
    {"gather_ranges", gather_ranges, METH_VARARGS,
     "Read each range of an open file to its place, and hash it, up to the first that cannot be read."},
    {"hash_ranges", hash_ranges, METH_VARARGS,
     "The XXH3-128 of each range of open files, 16 bytes each; of a file up to the first that cannot be read."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_ranges(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
