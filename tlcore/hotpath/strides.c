/* Copying tensors whose bytes do not lie together.
 *
 * A layer hands on parts of one larger result (queries, keys, values) all the time. Dimensions that lie together are
 * one, so that such a part is a few long runs.
 */
#include "strides.h"

#include <string.h>

/* Runs this short are copied faster by torch, which turns whole blocks, unless there are few of them. */
#define SHORT_RUN 32
#define FEW_BYTES (32 << 10)

int tlcore_find_source(const dlpack_tensor *view, Py_ssize_t bytes, tlcore_source *source)
{
    source->data = view->data;
    source->bytes = source->run = bytes;
    source->outer = 0;
    if (bytes == 0 || tlcore_is_contiguous(view))
        return 1;
    Py_ssize_t size = view->dtype.bits * view->dtype.lanes / 8;
    Py_ssize_t counts[TLCORE_DIMENSIONS], strides[TLCORE_DIMENSIONS];
    int found = 0;
    /* The innermost first. */
    for (int i = view->ndim - 1; i >= 0; i--) {
        Py_ssize_t count = view->shape[i], stride = view->strides[i] * size;
        if (count == 1)
            continue;
        if (found && stride == counts[found - 1] * strides[found - 1]) {
            counts[found - 1] *= count;
        } else {
            counts[found] = count;
            strides[found++] = stride;
        }
    }
    int first = found > 0 && strides[0] == size;
    source->run = first ? size * counts[0] : size;
    for (int i = found - 1; i >= first; i--) {
        source->counts[source->outer] = counts[i];
        source->strides[source->outer++] = strides[i];
    }
    return source->run >= SHORT_RUN || bytes <= FEW_BYTES;
}

static char *copy_runs(char *target, const char *data, Py_ssize_t count, Py_ssize_t stride, Py_ssize_t run)
{
    /* A size that the compiler knows makes a move of a call. */
#define EACH(bytes)                                             \
    for (Py_ssize_t i = 0; i < count; i++, data += stride) {    \
        memcpy(target, data, (size_t)(bytes));                  \
        target += (bytes);                                      \
    }
    switch (run) {
    case 1: EACH(1) break;
    case 2: EACH(2) break;
    case 4: EACH(4) break;
    case 8: EACH(8) break;
    default: EACH(run) break;
    }
#undef EACH
    return target;
}

static char *copy_dimension(char *target, const tlcore_source *source, const char *data, int dimension)
{
    Py_ssize_t count = source->counts[dimension], stride = source->strides[dimension];
    if (dimension == source->outer - 1)
        return copy_runs(target, data, count, stride, source->run);
    for (Py_ssize_t i = 0; i < count; i++, data += stride)
        target = copy_dimension(target, source, data, dimension + 1);
    return target;
}

static void copy(char *target, const tlcore_source *source)
{
    if (source->outer)
        copy_dimension(target, source, source->data, 0);
    else
        memcpy(target, source->data, (size_t)source->bytes);
}

void tlcore_copy_source(char *target, const tlcore_source *source)
{
    if (source->bytes < TLCORE_SMALL_BYTES) {
        copy(target, source);
        return;
    }
    Py_BEGIN_ALLOW_THREADS;
    copy(target, source);
    Py_END_ALLOW_THREADS;
}
