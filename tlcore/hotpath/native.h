/* What the parts of the extension share.
 *
 * Everything here has a twin in Python, which is the reference: where the two differ, this is wrong. Only the
 * limited API of CPython 3.11 is used, and no header but its own: torch's tensors are looked at through DLPack's
 * exchange functions, XXH3 is called by its address.
 */
#ifndef TLCORE_NATIVE_H
#define TLCORE_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* Counts up whenever a function changes what it takes or gives; `native.py` refuses any other. */
#define TLCORE_INTERFACE 14

/* Shorter work than this is over before another thread could use the interpreter, which is dear to get back. */
#define TLCORE_SMALL_BYTES (256 << 10)

/* A digest as text, with the byte that ends it. */
#define TLCORE_HEX_CHARS 33

/* XXH3-128 of some bytes, as lower-case hex. Needs no interpreter; `tlcore_can_hash` must have said yes. */
void tlcore_hex_digest(const void *data, size_t size, char *hex);

/* A digest as bytes, the highest first; and the same of some bytes in that form. */
#define TLCORE_DIGEST_BYTES 16
void tlcore_digest(const void *data, size_t size, unsigned char *digest);
int tlcore_can_hash(void);

/* The same of what comes piece by piece; NULL where there is no memory. `tlcore_hashes_pieces` must have said yes. */
int tlcore_hashes_pieces(void);
void *tlcore_hash_new(void);
void tlcore_hash_begin(void *state);
void tlcore_hash_more(void *state, const void *data, size_t size);
void tlcore_hash_end(void *state, unsigned char *digest);
void tlcore_hash_free(void *state);

/* An int that must lie in [0, most]; -1 with ValueError (or TypeError) set where it does not. */
Py_ssize_t tlcore_size(PyObject *number, Py_ssize_t most, const char *what);

/* Each adds a part's functions and types to the module; -1 with an exception set. */
int tlcore_add_hashing(PyObject *module);
int tlcore_add_copying(PyObject *module);
int tlcore_add_reading(PyObject *module);
int tlcore_add_ranges(PyObject *module);
int tlcore_add_beneath(PyObject *module);
int tlcore_add_entries(PyObject *module);
int tlcore_add_payloads(PyObject *module);
int tlcore_add_gathering(PyObject *module);
int tlcore_add_moving(PyObject *module);
int tlcore_add_rows(PyObject *module);
int tlcore_add_seals(PyObject *module);
int tlcore_add_spans(PyObject *module);
int tlcore_add_making(PyObject *module);
int tlcore_add_fingerprint(PyObject *module);
int tlcore_add_walker(PyObject *module);
int tlcore_add_listening(PyObject *module);
int tlcore_add_using(PyObject *module);

#endif
