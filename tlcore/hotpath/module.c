/* The extension module: what it is made of, and of which sources. */
#include "listening.h"

#ifndef TLCORE_SOURCES
#define TLCORE_SOURCES "unknown"
#endif

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_doc = "The hot path in C; see tlcore.hotpath.", .m_size = -1,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (PyModule_AddIntConstant(module, "INTERFACE", TLCORE_INTERFACE) ||
        PyModule_AddStringConstant(module, "SOURCES", TLCORE_SOURCES) || tlcore_add_hashing(module) ||
        tlcore_add_copying(module) || tlcore_add_reading(module) || tlcore_add_ranges(module) ||
        tlcore_add_beneath(module) || tlcore_add_entries(module) || tlcore_add_payloads(module) ||
        tlcore_add_gathering(module) || tlcore_add_moving(module) || tlcore_add_rows(module) || tlcore_add_seals(module) ||
        tlcore_add_spans(module) || tlcore_add_making(module) || tlcore_add_fingerprint(module) ||
        tlcore_add_looking(module) || tlcore_add_walker(module) || tlcore_add_hearing(module) ||
        tlcore_add_listening(module) || tlcore_add_using(module)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
