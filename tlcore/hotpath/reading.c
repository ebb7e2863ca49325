/* Reading many small files in one call without the interpreter's lock. */
#include "beneath.h"

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

static PyMethodDef functions[] = {
    {"read_files", read_files, METH_VARARGS,
     "Read whole files below a directory into a buffer; where each begins, -1 if it was not read."},
    {"identities", identities, METH_O,
     "Device, inode, size and time of change (ns) of each path itself; None where there is nothing."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_reading(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
