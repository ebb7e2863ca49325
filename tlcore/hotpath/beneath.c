/* Files below a directory, opened so that no symbolic link leads anywhere; and many small ones read in one call. */
#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One for all machines but Alpha; headers of older systems, which wheels are built with, do not have it. */
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#define NO_MAGIC_LINKS 0x02
#define NO_SYMLINKS 0x04
#define BENEATH 0x08

/* The kernel's struct open_how. */
typedef struct {
    uint64_t flags, mode, resolve;
} open_how;

int tlcore_is_plain(const char *name)
{
    for (;;) {
        size_t size = strcspn(name, "/");
        if (size == 0 || (size == 1 && name[0] == '.') || (size == 2 && name[0] == '.' && name[1] == '.'))
            return 0;
        if (name[size] == 0)
            return 1;
        name += size + 1;
    }
}

int tlcore_open_beneath(int root, const char *name, struct stat *state)
{
    open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK,
                    .resolve = BENEATH | NO_SYMLINKS | NO_MAGIC_LINKS};
    if (!tlcore_is_plain(name))
        return -1;
    int handle = (int)syscall(SYS_openat2, root, name, &how, sizeof how);
    if (handle >= 0 && (fstat(handle, state) || !S_ISREG(state->st_mode))) {
        close(handle);
        return -1;
    }
    return handle;
}

int tlcore_open_directory(int root, const char *name)
{
    open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_DIRECTORY, .resolve = BENEATH | NO_SYMLINKS | NO_MAGIC_LINKS};
    if (!tlcore_is_plain(name)) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_openat2, root, name, &how, sizeof how);
}

long tlcore_read_entries(int handle, char *entries, size_t room)
{
    return syscall(SYS_getdents64, handle, entries, room);
}

ssize_t tlcore_read_piece(int handle, char *target, size_t most)
{
    size_t done = 0;
    while (done < most) {
        ssize_t count = read(handle, target + done, most - done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -1;
        if (count == 0)
            break;
        done += (size_t)count;
    }
    return (ssize_t)done;
}

/* A file that is a plain one directly in a directory needs no way there to be watched: -1 for all else. */
static int open_directly(const char *directory, const char *name)
{
    char path[1024];
    size_t begin = strlen(directory), size = strlen(name);
    if (begin + size + 2 > sizeof path || strchr(name, '/') != NULL || !tlcore_is_plain(name))
        return -1;
    memcpy(path, directory, begin);
    path[begin] = '/';
    memcpy(path + begin + 1, name, size + 1);
    return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
}

int tlcore_read_directly(PyObject *directory, PyObject *name, char *target, Py_ssize_t bytes)
{
    struct stat state;
    int handle = open_directly(PyBytes_AsString(directory), PyBytes_AsString(name));
    if (handle < 0)
        return 0;
    int whole = fstat(handle, &state) == 0 && S_ISREG(state.st_mode) && state.st_size == bytes &&
                tlcore_read_piece(handle, target, (size_t)bytes) == bytes;
    close(handle);
    return whole;
}

int tlcore_move_all(tlcore_mover move, int handle, struct iovec *parts, int count, size_t most)
{
    for (int first = 0; first < count;) {
        int last = first;
        size_t bytes = parts[first].iov_len;
        while (last + 1 < count && bytes < most)
            bytes += parts[++last].iov_len;
        size_t whole = parts[last].iov_len;
        if (bytes > most)
            parts[last].iov_len -= bytes - most;
        ssize_t moved = bytes ? move(handle, parts + first, last - first + 1) : 0;
        int error = moved < 0 ? errno : EIO;
        parts[last].iov_len = whole;
        if (moved < 0 && error == EINTR)
            continue;
        if (moved < 0 || (moved == 0 && bytes))
            return error;
        for (; first < count && (size_t)moved >= parts[first].iov_len; first++)
            moved -= (ssize_t)parts[first].iov_len;
        if (first < count) {
            parts[first].iov_base = (char *)parts[first].iov_base + moved;
            parts[first].iov_len -= (size_t)moved;
        }
    }
    return 0;
}

void tlcore_release_places(tlcore_places *all)
{
    if (all->root >= 0)
        close(all->root);
    for (Py_ssize_t i = 0; i < all->count; i++)
        Py_XDECREF(all->names[i]);
    PyMem_Free(all->names);
    Py_XDECREF(all->directory);
}

int tlcore_take_places(PyObject *directory, PyObject *sequence, tlcore_places *all)
{
    memset(all, 0, sizeof *all);
    all->root = -1;
    PyObject *items = PySequence_Tuple(sequence);
    if (items == NULL)
        return -1;
    Py_ssize_t count = PyTuple_Size(items);
    all->names = PyMem_Calloc((size_t)count + 1, sizeof *all->names);
    if (all->names == NULL)
        PyErr_NoMemory();
    else if (PyUnicode_FSConverter(directory, &all->directory))
        for (PyObject **name = all->names; all->count < count; name++, all->count++)
            if (!PyUnicode_FSConverter(PyTuple_GetItem(items, all->count), name))
                break;
    Py_DECREF(items);
    if (PyErr_Occurred()) {
        tlcore_release_places(all);
        return -1;
    }
    all->root = open(PyBytes_AsString(all->directory), O_PATH | O_DIRECTORY | O_CLOEXEC);
    return 0;
}

/* Whole files one after the other; `ends[i]` is where file i ends, and where it begins if it was not read. */
typedef struct {
    char *memory;
    size_t used, room;
    size_t *ends;
    unsigned char *read;
} texts;

static int read_text(int handle, size_t size, texts *all)
{
    if (all->used + size > all->room) {
        size_t room = 2 * (all->used + size);
        char *memory = realloc(all->memory, room);
        if (memory == NULL)
            return 0;
        all->memory = memory;
        all->room = room;
    }
    if (tlcore_read_piece(handle, all->memory + all->used, size) != (ssize_t)size)
        return 0;
    all->used += size;
    return 1;
}

static void read_all(const tlcore_places *files, size_t most, texts *all)
{
    for (Py_ssize_t i = 0; i < files->count; i++) {
        struct stat state;
        int handle = tlcore_open_beneath(files->root, PyBytes_AsString(files->names[i]), &state);
        if (handle >= 0) {
            if ((uint64_t)state.st_size <= most - all->used)
                all->read[i] = (unsigned char)read_text(handle, (size_t)state.st_size, all);
            close(handle);
        }
        all->ends[i] = all->used;
    }
}

static PyObject *list_texts(const texts *all, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    size_t begin = 0;
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        size_t size = all->ends[i] - begin;
        const char *data = size ? all->memory + begin : "";
        PyObject *text = all->read[i] ? PyBytes_FromStringAndSize(data, (Py_ssize_t)size) : Py_NewRef(Py_None);
        begin = all->ends[i];
        if (text == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, text);
    }
    return list;
}

static PyObject *read_texts(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *number, *found = NULL;
    tlcore_places files;
    if (!PyArg_ParseTuple(args, "OOO:read_texts", &directory, &names, &number))
        return NULL;
    Py_ssize_t most = tlcore_size(number, PY_SSIZE_T_MAX / 4, "most bytes of texts");
    if (most < 0 || tlcore_take_places(directory, names, &files))
        return NULL;
    texts all = {0};
    all.ends = PyMem_Calloc((size_t)files.count + 1, sizeof *all.ends);
    all.read = PyMem_Calloc((size_t)files.count + 1, 1);
    if (all.ends == NULL || all.read == NULL) {
        PyErr_NoMemory();
    } else {
        Py_BEGIN_ALLOW_THREADS;
        read_all(&files, (size_t)most, &all);
        Py_END_ALLOW_THREADS;
        found = list_texts(&all, files.count);
    }
    free(all.memory);
    PyMem_Free(all.ends);
    PyMem_Free(all.read);
    tlcore_release_places(&files);
    return found;
}

tlcore_span *tlcore_checked_spans(const Py_buffer *raw, Py_ssize_t count, Py_ssize_t room, int64_t target)
{
    if (raw->len != count * TLCORE_SPAN_NUMBERS * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_Format(PyExc_ValueError, "%zd files need as many spans of four 64-bit integers", count);
        return NULL;
    }
    tlcore_span *spans = PyMem_Calloc((size_t)count + 1, sizeof *spans);
    if (spans == NULL)
        return (tlcore_span *)PyErr_NoMemory();
    int64_t kept = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        tlcore_span *one = &spans[i];
        memcpy(one, (const char *)raw->buf + (size_t)i * TLCORE_SPAN_NUMBERS * sizeof(int64_t),
               TLCORE_SPAN_NUMBERS * sizeof(int64_t));
        one->kept = kept;
        if (one->begin < 0 || one->end < one->begin || one->size < one->end ||
            one->size - (one->end - one->begin) > room - kept || one->at < -1 ||
            (one->at >= 0 && one->at > target - (one->end - one->begin))) {
            PyErr_Format(PyExc_ValueError, "span %zd: [%lld, %lld) of %lld bytes, put at %lld, does not fit", i,
                         (long long)one->begin, (long long)one->end, (long long)one->size, (long long)one->at);
            PyMem_Free(spans);
            return NULL;
        }
        kept += one->size - (one->end - one->begin);
    }
    return spans;
}

static PyMethodDef functions[] = {
    {"read_texts", read_texts, METH_VARARGS,
     "The bytes of small files below a directory, None for what was not read."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_beneath(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
