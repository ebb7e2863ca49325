/* Reading many small files, or hashing many ranges of one, in one call without the interpreter's lock. */
#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where a file begins in the buffer: a multiple of this, so that any dtype can be looked at in place. */
#define ALIGNMENT 64
#define NOT_READ (-1)

typedef struct {
    Py_ssize_t bytes;
    Py_ssize_t offset;
} file_job;

/* All bytes of a regular file that has exactly `bytes` of them; 0 where it is anything else. */
static int read_whole(int root, const char *name, char *target, Py_ssize_t bytes)
{
    struct stat state;
    int handle = tlcore_open_beneath(root, name, &state);
    if (handle < 0)
        return 0;
    int whole = state.st_size == bytes && tlcore_read_piece(handle, target, (size_t)bytes) == bytes;
    close(handle);
    return whole;
}

static void read_jobs(const tlcore_places *files, file_job *jobs, char *target)
{
    for (Py_ssize_t i = 0; i < files->count; i++)
        if (!read_whole(files->root, PyBytes_AsString(files->names[i]), target + jobs[i].offset, jobs[i].bytes))
            jobs[i].offset = NOT_READ;
}

/* One job, and where the next one begins; -1 with an exception set. */
static Py_ssize_t take_job(PyObject *sizes, Py_ssize_t i, Py_ssize_t begin, Py_ssize_t room, file_job *job)
{
    job->bytes = tlcore_size(PyTuple_GetItem(sizes, i), room - begin, "bytes of a file, in the buffer's rest");
    if (job->bytes < 0)
        return -1;
    job->offset = begin;
    /* `begin` is at most the size of a buffer that exists, so this cannot overflow. */
    Py_ssize_t end = (begin + job->bytes + ALIGNMENT - 1) & ~(Py_ssize_t)(ALIGNMENT - 1);
    return end < room ? end : room;
}

static PyObject *offsets_of(const file_job *jobs, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *number = PyLong_FromSsize_t(jobs[i].offset);
        if (number == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, number);
    }
    return list;
}

static PyObject *run_jobs(const tlcore_places *files, PyObject *sizes, Py_buffer *target)
{
    Py_ssize_t count = files->count, begin = 0;
    if (PyTuple_Size(sizes) != count)
        return PyErr_Format(PyExc_ValueError, "%zd names need as many sizes", count);
    file_job *jobs = PyMem_Calloc((size_t)count + 1, sizeof *jobs);
    if (jobs == NULL)
        return PyErr_NoMemory();
    PyObject *found = NULL;
    for (Py_ssize_t i = 0; i < count && begin >= 0; i++)
        begin = take_job(sizes, i, begin, target->len, &jobs[i]);
    if (begin >= 0) {
        Py_BEGIN_ALLOW_THREADS;
        read_jobs(files, jobs, target->buf);
        Py_END_ALLOW_THREADS;
        found = offsets_of(jobs, count);
    }
    PyMem_Free(jobs);
    return found;
}

/* Whether there is one file and it was read; -1 with an exception set. */
static int read_alone(PyObject *directory, PyObject *names, PyObject *sizes, Py_buffer *target)
{
    PyObject *home = NULL, *name = NULL;
    int whole = 0;
    if (!PyTuple_Check(names) || PyTuple_Size(names) != 1 || PyTuple_Size(sizes) != 1)
        return 0;
    Py_ssize_t bytes = tlcore_size(PyTuple_GetItem(sizes, 0), target->len, "bytes of a file, in the buffer's rest");
    if (bytes >= 0 && PyUnicode_FSConverter(directory, &home) && PyUnicode_FSConverter(PyTuple_GetItem(names, 0), &name)) {
        Py_BEGIN_ALLOW_THREADS;
        whole = tlcore_read_directly(home, name, target->buf, bytes);
        Py_END_ALLOW_THREADS;
    }
    Py_XDECREF(home);
    Py_XDECREF(name);
    return PyErr_Occurred() ? -1 : whole;
}

static PyObject *read_files(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *sizes, *found = NULL;
    tlcore_places files;
    Py_buffer target;
    if (!PyArg_ParseTuple(args, "w*OOO:read_files", &target, &directory, &names, &sizes))
        return NULL;
    sizes = PySequence_Tuple(sizes);
    int alone = sizes == NULL ? -1 : read_alone(directory, names, sizes, &target);
    if (alone > 0)
        found = Py_BuildValue("[i]", 0);
    else if (alone == 0 && tlcore_take_places(directory, names, &files) == 0) {
        found = run_jobs(&files, sizes, &target);
        tlcore_release_places(&files);
    }
    Py_XDECREF(sizes);
    PyBuffer_Release(&target);
    return found;
}

typedef struct {
    struct stat state;
    int found;
} identity;

static PyObject *identity_of(const identity *one)
{
    if (!one->found)
        return Py_NewRef(Py_None);
    const struct stat *state = &one->state;
    long long modified = (long long)state->st_mtim.tv_sec * 1000000000LL + state->st_mtim.tv_nsec;
    return Py_BuildValue("KKLL", (unsigned long long)state->st_dev, (unsigned long long)state->st_ino,
                         (long long)state->st_size, modified);
}

static PyObject *look_up(PyObject *paths)
{
    Py_ssize_t count = PyTuple_Size(paths), taken = 0;
    PyObject **owners = PyMem_Calloc((size_t)count + 1, sizeof *owners);
    identity *all = PyMem_Calloc((size_t)count + 1, sizeof *all);
    PyObject *list = NULL;
    if (owners == NULL || all == NULL)
        PyErr_NoMemory();
    else
        while (taken < count && PyUnicode_FSConverter(PyTuple_GetItem(paths, taken), &owners[taken]))
            taken++;
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t i = 0; i < count; i++)
            all[i].found = lstat(PyBytes_AsString(owners[i]), &all[i].state) == 0;
        Py_END_ALLOW_THREADS;
        list = PyList_New(count);
    }
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = identity_of(&all[i]);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, item);
    }
    for (Py_ssize_t i = 0; i < taken; i++)
        Py_XDECREF(owners[i]);
    PyMem_Free(owners);
    PyMem_Free(all);
    return list;
}

static PyObject *identities(PyObject *module, PyObject *paths)
{
    (void)module;
    PyObject *items = PySequence_Tuple(paths);
    PyObject *found = items == NULL ? NULL : look_up(items);
    Py_XDECREF(items);
    return found;
}

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

static PyObject *hash_checked(int handle, const Py_buffer *ranges, const Py_buffer *scratch)
{
    Py_ssize_t count = ranges->len / (Py_ssize_t)sizeof(range), done;
    if (!tlcore_can_hash())
        return PyErr_Format(PyExc_RuntimeError, "no hash function has been given to the extension");
    if (!check_ranges(ranges, count, scratch->len))
        return NULL;
    PyObject *found = PyBytes_FromStringAndSize(NULL, count * TLCORE_DIGEST_BYTES);
    if (found == NULL)
        return NULL;
    /* Nobody else has the new object yet. */
    unsigned char *digests = (unsigned char *)PyBytes_AsString(found);
    Py_BEGIN_ALLOW_THREADS;
    done = hash_jobs(handle, ranges, count, scratch, digests);
    Py_END_ALLOW_THREADS;
    if (done == count)
        return found;
    PyObject *less = PyBytes_FromStringAndSize((const char *)digests, done * TLCORE_DIGEST_BYTES);
    Py_DECREF(found);
    return less;
}

static PyObject *hash_ranges(PyObject *module, PyObject *args)
{
    (void)module;
    int handle;
    Py_buffer ranges, scratch;
    if (!PyArg_ParseTuple(args, "iy*w*:hash_ranges", &handle, &ranges, &scratch))
        return NULL;
    PyObject *found = hash_checked(handle, &ranges, &scratch);
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
    {"read_files", read_files, METH_VARARGS,
     "Read whole files below a directory into a buffer; where each begins, -1 if it was not read."},
    {"hash_ranges", hash_ranges, METH_VARARGS,
     "The XXH3-128 of each range of an open file, 16 bytes each, up to the first that cannot be read."},
    {"identities", identities, METH_O,
     "Device, inode, size and time of change (ns) of each path itself; None where there is nothing."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_reading(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
