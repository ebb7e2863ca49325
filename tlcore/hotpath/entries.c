/* What directories have in them: how many names, and all files below one, in one call. */
#include "beneath.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the kernel calls struct linux_dirent64; only these of its fields are looked at. */
#define LENGTH_AT 16
#define KIND_AT 18
#define NAME_AT 19
#define ROOM 32768

typedef struct {
    unsigned char kind;
    const char *name;
} directory_entry;

/* The next one but "." and ".."; 0 at the end of those that were read. */
static int next_entry(const char *entries, long size, long *at, directory_entry *found)
{
    while (*at < size) {
        unsigned short length;
        memcpy(&length, entries + *at + LENGTH_AT, sizeof length);
        found->kind = (unsigned char)entries[*at + KIND_AT];
        found->name = entries + *at + NAME_AT;
        *at += length;
        if (strcmp(found->name, ".") != 0 && strcmp(found->name, "..") != 0)
            return 1;
    }
    return 0;
}

static Py_ssize_t count_in(int root, const char *name, char *entries)
{
    int handle = tlcore_open_directory(root, name);
    if (handle < 0)
        return -1;
    Py_ssize_t count = 0;
    long size;
    while ((size = tlcore_read_entries(handle, entries, ROOM)) > 0) {
        directory_entry found;
        for (long at = 0; next_entry(entries, size, &at, &found);)
            count++;
    }
    close(handle);
    return size < 0 ? -1 : count;
}

/* Names, each with its end, one after the other. */
typedef struct {
    char *memory;
    size_t used, room;
} name_list;

/* Add `directory/name`; -1 where there is no memory. */
static int add(name_list *all, const char *directory, const char *name)
{
    size_t one = strlen(directory), other = strlen(name), size = one + other + 2;
    if (all->used + size > all->room) {
        size_t room = 2 * (all->used + size);
        char *memory = realloc(all->memory, room);
        if (memory == NULL)
            return -1;
        all->memory = memory;
        all->room = room;
    }
    char *to = all->memory + all->used;
    memcpy(to, directory, one);
    to[one] = '/';
    memcpy(to + one + 1, name, other + 1);
    all->used += size;
    return 0;
}

/* What an entry is, also where the file system does not say so itself. */
static unsigned char kind_of(int handle, const directory_entry *found)
{
    struct stat state;
    if (found->kind != DT_UNKNOWN)
        return found->kind;
    if (fstatat(handle, found->name, &state, AT_SYMLINK_NOFOLLOW))
        return DT_UNKNOWN;
    return S_ISREG(state.st_mode) ? DT_REG : S_ISDIR(state.st_mode) ? DT_DIR : DT_UNKNOWN;
}

/* Add what lies directly in a directory, which is nothing where it has vanished; -1 for any other error. */
static int list_in(int root, const char *directory, char *entries, name_list *files, name_list *folders)
{
    int handle = tlcore_open_directory(root, directory), failed = 0;
    if (handle < 0)
        return errno == ENOENT || errno == ENOTDIR ? 0 : -1;
    long size;
    while (!failed && (size = tlcore_read_entries(handle, entries, ROOM)) != 0) {
        directory_entry found;
        failed = size < 0;
        for (long at = 0; !failed && next_entry(entries, size, &at, &found);) {
            unsigned char kind = kind_of(handle, &found);
            if (kind == DT_REG || kind == DT_DIR)
                failed = add(kind == DT_REG ? files : folders, directory, found.name);
        }
    }
    close(handle);
    return failed ? -1 : 0;
}

/* Add all files below a directory. */
static int list_below(int root, const char *directory, char *entries, name_list *files)
{
    name_list folders = {0};
    int failed = list_in(root, directory, entries, files, &folders);
    for (size_t at = 0; !failed && at < folders.used;) {
        /* Their memory may move while more are added. */
        char *name = strdup(folders.memory + at);
        at += strlen(folders.memory + at) + 1;
        failed = name == NULL ? -1 : list_in(root, name, entries, files, &folders);
        free(name);
    }
    free(folders.memory);
    return failed;
}

static PyObject *as_list(const name_list *all)
{
    PyObject *list = PyList_New(0);
    for (size_t at = 0; list != NULL && at < all->used;) {
        size_t size = strlen(all->memory + at);
        PyObject *name = PyUnicode_DecodeFSDefaultAndSize(all->memory + at, (Py_ssize_t)size);
        if (name == NULL || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
        at += size + 1;
    }
    return list;
}

static PyObject *list_files(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *name;
    tlcore_places places;
    if (!PyArg_ParseTuple(args, "OO:list_files", &directory, &name))
        return NULL;
    PyObject *one = PyTuple_Pack(1, name);
    int failed = one == NULL || tlcore_take_places(directory, one, &places);
    Py_XDECREF(one);
    if (failed)
        return NULL;
    name_list files = {0};
    Py_BEGIN_ALLOW_THREADS;
    char entries[ROOM];
    failed = list_below(places.root, PyBytes_AsString(places.names[0]), entries, &files);
    Py_END_ALLOW_THREADS;
    PyObject *found = failed ? Py_NewRef(Py_None) : as_list(&files);
    free(files.memory);
    tlcore_release_places(&places);
    return found;
}

static PyObject *count_entries(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names;
    tlcore_places places;
    if (!PyArg_ParseTuple(args, "OO:count_entries", &directory, &names) ||
        tlcore_take_places(directory, names, &places))
        return NULL;
    Py_ssize_t total = 0;
    Py_BEGIN_ALLOW_THREADS;
    char entries[ROOM];
    for (Py_ssize_t i = 0; i < places.count && total >= 0; i++) {
        Py_ssize_t count = count_in(places.root, PyBytes_AsString(places.names[i]), entries);
        total = count < 0 ? -1 : total + count;
    }
    Py_END_ALLOW_THREADS;
    tlcore_release_places(&places);
    return PyLong_FromSsize_t(total);
}

static PyMethodDef functions[] = {
    {"count_entries", count_entries, METH_VARARGS,
     "How many names the directories below one have together; -1 where one cannot be listed."},
    {"list_files", list_files, METH_VARARGS,
     "The names of all regular files below a directory; None where one cannot be listed."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_entries(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
