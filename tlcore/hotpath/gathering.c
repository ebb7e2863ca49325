/* Reading a part of many files straight to where it belongs, and hashing it, without the interpreter's lock. */
#include "beneath.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define NOT_READ (-1)
/* What one read may ask for on any system. */
#define MOST_AT_ONCE ((size_t)1 << 30)

typedef struct {
    const tlcore_places *files;
    const tlcore_span *spans;
    char *kept, *target;
    unsigned char *digests;
    Py_ssize_t *first;
    struct stat *states;
    /* Hard links of one file follow each other by its number here. */
    Py_ssize_t *next, *heads;
    size_t mask;
    char *spare;
    size_t room;
} gathering;

static Py_ssize_t *head_of(const gathering *job, const struct stat *state)
{
    uint64_t mixed = ((uint64_t)state->st_ino ^ (uint64_t)state->st_dev << 32) * UINT64_C(0x9E3779B97F4A7C15);
    return &job->heads[(size_t)(mixed >> 17) & job->mask];
}

/* An earlier file that is the same, as it is now, and of which the same part was read; -1 for none. */
static Py_ssize_t same_as(const gathering *job, Py_ssize_t i, const struct stat *now)
{
    for (Py_ssize_t j = *head_of(job, now); j >= 0; j = job->next[j]) {
        const struct stat *then = &job->states[j];
        const tlcore_span *one = &job->spans[i], *other = &job->spans[j];
        if (now->st_ino == then->st_ino && now->st_dev == then->st_dev && now->st_size == then->st_size &&
            now->st_mtim.tv_sec == then->st_mtim.tv_sec && now->st_mtim.tv_nsec == then->st_mtim.tv_nsec &&
            one->size == other->size && one->begin == other->begin && one->end == other->end)
            return j;
    }
    return -1;
}

/* Where the wanted part of a file goes; NULL where there is no memory for what goes nowhere. */
static char *place_of(gathering *job, const tlcore_span *one)
{
    if (one->at >= 0)
        return job->target + one->at;
    size_t needed = (size_t)(one->end - one->begin) + 1;
    if (needed > job->room) {
        free(job->spare);
        job->spare = malloc(needed);
        job->room = job->spare == NULL ? 0 : needed;
    }
    return job->spare;
}

static int gather_file(gathering *job, Py_ssize_t i)
{
    const tlcore_span *one = &job->spans[i];
    char *kept = job->kept + one->kept;
    int handle = tlcore_open_beneath(job->files->root, PyBytes_AsString(job->files->names[i]), &job->states[i]);
    if (handle < 0)
        return 0;
    char *place = job->states[i].st_size == one->size ? place_of(job, one) : NULL;
    size_t wanted = (size_t)(one->end - one->begin);
    struct iovec parts[] = {
        {kept, (size_t)one->begin}, {place, wanted}, {kept + one->begin, (size_t)(one->size - one->end)}};
    int whole = place != NULL && tlcore_move_all(readv, handle, parts, 3, MOST_AT_ONCE) == 0;
    close(handle);
    if (whole)
        tlcore_digest(place, wanted, job->digests + i * TLCORE_DIGEST_BYTES);
    return whole;
}

static void gather_files(gathering *job)
{
    for (Py_ssize_t i = 0; i < job->files->count; i++) {
        const char *name = PyBytes_AsString(job->files->names[i]);
        Py_ssize_t same = -1;
        job->first[i] = NOT_READ;
        /* What goes nowhere need not be read twice. */
        if (job->spans[i].at < 0 && tlcore_is_plain(name) &&
            fstatat(job->files->root, name, &job->states[i], AT_SYMLINK_NOFOLLOW) == 0)
            same = same_as(job, i, &job->states[i]);
        if (same >= 0) {
            memcpy(job->digests + i * TLCORE_DIGEST_BYTES, job->digests + same * TLCORE_DIGEST_BYTES,
                   TLCORE_DIGEST_BYTES);
            job->first[i] = same;
        } else if (gather_file(job, i)) {
            Py_ssize_t *head = head_of(job, &job->states[i]);
            job->next[i] = *head;
            *head = job->first[i] = i;
        }
    }
}

static PyObject *run_gathering(const tlcore_places *files, const tlcore_span *spans, char *kept, char *target)
{
    size_t slots = 8, count = (size_t)files->count;
    while (slots < 2 * count)
        slots *= 2;
    PyObject *found = NULL, *digests = PyBytes_FromStringAndSize(NULL, files->count * TLCORE_DIGEST_BYTES);
    PyObject *first = PyBytes_FromStringAndSize(NULL, files->count * (Py_ssize_t)sizeof(Py_ssize_t));
    gathering job = {.files = files, .spans = spans, .kept = kept, .target = target, .mask = slots - 1};
    job.first = PyMem_Calloc(count + 1, sizeof *job.first);
    job.next = PyMem_Calloc(count + 1, sizeof *job.next);
    job.heads = PyMem_Calloc(slots, sizeof *job.heads);
    job.states = PyMem_Calloc(count + 1, sizeof *job.states);
    if (digests == NULL || first == NULL || job.first == NULL || job.next == NULL || job.heads == NULL ||
        job.states == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
    } else {
        /* Nobody else has the new objects yet. */
        job.digests = (unsigned char *)PyBytes_AsString(digests);
        memset(job.digests, 0, count * TLCORE_DIGEST_BYTES);
        for (size_t i = 0; i < slots; i++)
            job.heads[i] = -1;
        Py_BEGIN_ALLOW_THREADS;
        gather_files(&job);
        Py_END_ALLOW_THREADS;
        int64_t *indices = (int64_t *)(void *)PyBytes_AsString(first);
        for (size_t i = 0; i < count; i++) {
            int64_t index = job.first[i];
            memcpy(indices + i, &index, sizeof index);
        }
        found = PyTuple_Pack(2, first, digests);
    }
    free(job.spare);
    PyMem_Free(job.states);
    PyMem_Free(job.heads);
    PyMem_Free(job.next);
    PyMem_Free(job.first);
    Py_XDECREF(digests);
    Py_XDECREF(first);
    return found;
}

static PyObject *gather_payloads(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *found = NULL;
    Py_buffer raw, kept, target;
    tlcore_places files;
    if (!PyArg_ParseTuple(args, "OOy*w*w*:gather_payloads", &directory, &names, &raw, &kept, &target))
        return NULL;
    if (!tlcore_can_hash()) {
        PyErr_SetString(PyExc_RuntimeError, "no hash function has been given to the extension");
    } else if (tlcore_take_places(directory, names, &files) == 0) {
        tlcore_span *spans = tlcore_checked_spans(&raw, files.count, kept.len, target.len);
        if (spans != NULL)
            found = run_gathering(&files, spans, kept.buf, target.buf);
        PyMem_Free(spans);
        tlcore_release_places(&files);
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&kept);
    PyBuffer_Release(&target);
    return found;
}

static PyMethodDef functions[] = {
    {"gather_payloads", gather_payloads, METH_VARARGS,
     "Read a part of each file below a directory into a buffer, the rest into another; and its XXH3-128."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_gathering(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
