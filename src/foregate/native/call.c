/* Calls of the other compiled libraries from Python. Where the caches are cold, as between two layers of a model, ctypes
 * takes 6 us for a call, and numpy or struct as long again for its answer.
 *
 * The only part that needs Python's headers: without them ctypes calls the same functions. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stddef.h>
#include <stdint.h>

enum { MOST = 14 };

/* A C function of `count` arguments, each of 64 bits (a pointer or int64_t), that returns int. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    void *run;
    int count;
} function;

typedef int64_t a;

#define AS(...) ((int (*)(__VA_ARGS__))f)

static int run(void *f, int count, const a *v) {
    switch (count) {
    case 1: return AS(a)(v[0]);
    case 2: return AS(a, a)(v[0], v[1]);
    case 3: return AS(a, a, a)(v[0], v[1], v[2]);
    case 4: return AS(a, a, a, a)(v[0], v[1], v[2], v[3]);
    case 5: return AS(a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4]);
    case 6: return AS(a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5]);
    case 7: return AS(a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6]);
    case 8: return AS(a, a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
    case 9: return AS(a, a, a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);
    case 10: return AS(a, a, a, a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]);
    case 14:
        return AS(a, a, a, a, a, a, a, a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9],
                                                           v[10], v[11], v[12], v[13]);
    }
    return -1;
}

static int can_run(int count) { return (count >= 1 && count <= 10) || count == MOST; }

/* Integers and None, which is NULL. Other threads of Python go on meanwhile. */
static PyObject *call(PyObject *self, PyObject *const *given, size_t flags, PyObject *names) {
    const function *f = (const function *)self;
    const Py_ssize_t count = PyVectorcall_NARGS(flags);
    if (count != f->count || (names && PyTuple_GET_SIZE(names)))
        return PyErr_Format(PyExc_TypeError, "takes %d arguments by position, not %zd", f->count, count);
    a values[MOST];
    for (int i = 0; i < f->count; i++) {
        values[i] = given[i] == Py_None ? 0 : PyLong_AsLongLong(given[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return NULL;
    }
    int answer;
    Py_BEGIN_ALLOW_THREADS
    answer = run(f->run, f->count, values);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(answer);
}

static PyObject *make(PyTypeObject *type, PyObject *given, PyObject *named) {
    unsigned long long address;
    int count;
    static char *names[] = {"address", "count", NULL};
    if (!PyArg_ParseTupleAndKeywords(given, named, "Ki", names, &address, &count))
        return NULL;
    if (!address || !can_run(count))
        return PyErr_Format(PyExc_ValueError, "a function at %llu of %d arguments", address, count);
    function *made = (function *)type->tp_alloc(type, 0);
    if (made) {
        made->call = call;
        made->run = (void *)(uintptr_t)address;
        made->count = count;
    }
    return (PyObject *)made;
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(function, call), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject Function = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "foregate.native._call.Function",
    .tp_doc = "Function(address, count): the C function at `address`, of `count` arguments of 64 bits, which returns int.",
    .tp_basicsize = sizeof(function),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(function, call),
    .tp_call = PyVectorcall_Call,
    .tp_members = members,
    .tp_new = make,
};

/* ---- What a prediction kernel wrote ---- */

/* A tuple of `count` float32 numbers or, unless they are `real`, int32. */
static PyObject *numbers(const void *from, Py_ssize_t count, int real) {
    PyObject *made = PyTuple_New(count);
    for (Py_ssize_t i = 0; made && i < count; i++) {
        PyObject *number =
            real ? PyFloat_FromDouble(((const float *)from)[i]) : PyLong_FromLong(((const int32_t *)from)[i]);
        if (!number)
            Py_CLEAR(made);
        else
            PyTuple_SET_ITEM(made, i, number);
    }
    return made;
}

/* A named tuple of three, as its own type makes it from a tuple. */
static PyObject *prediction(PyTypeObject *type, PyObject *layer, PyObject *experts, PyObject *scores) {
    PyObject *made = NULL, *fields = NULL, *given = NULL;
    if (experts && scores && (fields = PyTuple_Pack(3, layer, experts, scores)) && (given = PyTuple_Pack(1, fields)))
        made = PyTuple_Type.tp_new(type, given, NULL);
    Py_XDECREF(given);
    Py_XDECREF(fields);
    Py_XDECREF(experts);
    Py_XDECREF(scores);
    return made;
}

/* predictions(scores, experts, parts, Prediction): a Prediction(layer, experts, scores) for each (layer, first, count) of
 * `parts`, a tuple, of the float32 and int32 numbers that lie at the first two. */
static PyObject *predictions(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    (void)module;
    if (count != 4 || !PyTuple_CheckExact(given[2]) || !PyType_Check(given[3]) ||
        !PyType_IsSubtype((PyTypeObject *)given[3], &PyTuple_Type))
        return PyErr_Format(PyExc_TypeError, "takes two addresses, a tuple and a type of named tuples");
    const float *scores = PyLong_AsVoidPtr(given[0]);
    const int32_t *experts = PyLong_AsVoidPtr(given[1]);
    if (PyErr_Occurred())
        return NULL;
    const Py_ssize_t parts = PyTuple_GET_SIZE(given[2]);
    PyObject *made = PyList_New(parts);
    for (Py_ssize_t i = 0; made && i < parts; i++) {
        PyObject *layer, *part = PyTuple_GET_ITEM(given[2], i);
        Py_ssize_t first, named;
        PyObject *one = NULL;
        if (PyArg_ParseTuple(part, "Onn", &layer, &first, &named))
            one = prediction((PyTypeObject *)given[3], layer, numbers(experts + first, named, 0),
                             numbers(scores + first, named, 1));
        if (!one)
            Py_CLEAR(made);
        else
            PyList_SET_ITEM(made, i, one);
    }
    return made;
}

static PyMethodDef methods[] = {
    {"predictions", (PyCFunction)(void (*)(void))predictions, METH_FASTCALL, "Predictions from what a kernel wrote."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_call", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__call(void) {
    if (PyType_Ready(&Function) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Function", (PyObject *)&Function) < 0)
        Py_CLEAR(made);
    return made;
}
