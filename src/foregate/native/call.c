/* Calls of the other compiled libraries from Python. Where the caches are cold, as between two layers of a model, ctypes
 * takes 6 us for a call, and numpy or struct as long again for its answer.
 *
 * The only part that needs Python's headers: without them ctypes calls the same functions. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MOST = 16 };

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
    case 16:
        return AS(a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a)(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8],
                                                                 v[9], v[10], v[11], v[12], v[13], v[14], v[15]);
    }
    return -1;
}

static int can_run(int count) { return (count >= 1 && count <= 10) || count == 14 || count == MOST; }

/* 1, and where it lies, if `array` is one, in one piece, which its owner keeps; 0 for a number; -1 with an error. */
static int read_place(PyObject *array, a *value) {
    Py_buffer view;
    if (PyLong_Check(array) || !PyObject_CheckBuffer(array))
        return 0;
    if (PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS))
        return -1;
    const int found = view.ndim > 0; /* numpy's numbers are buffers, too */
    if (found)
        *value = (a)(uintptr_t)view.buf;
    PyBuffer_Release(&view);
    return found;
}

/* `given`, integers, arrays and None, which is NULL, to `values`; -1 with an error. */
static int read_values(PyObject *const *given, int count, a *values) {
    for (int i = 0; i < count; i++) {
        const int placed = read_place(given[i], values + i);
        if (placed < 0)
            return -1;
        if (placed)
            continue;
        values[i] = given[i] == Py_None ? 0 : PyLong_AsLongLong(given[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int read_tuple(PyObject *given, a *values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); i++) {
        PyObject *one = PyTuple_GET_ITEM(given, i);
        if (read_values(&one, 1, values + i))
            return -1;
    }
    return 0;
}

static int refuse_count(size_t flags, PyObject *names, int wanted) {
    const Py_ssize_t count = PyVectorcall_NARGS(flags);
    if (count == wanted && !(names && PyTuple_GET_SIZE(names)))
        return 0;
    PyErr_Format(PyExc_TypeError, "takes %d arguments by position, not %zd", wanted, count);
    return -1;
}

/* Other threads of Python go on meanwhile. */
static int run_unlocked(void *f, int count, const a *values) {
    int answer;
    Py_BEGIN_ALLOW_THREADS
    answer = run(f, count, values);
    Py_END_ALLOW_THREADS
    return answer;
}

static PyObject *call(PyObject *self, PyObject *const *given, size_t flags, PyObject *names) {
    const function *f = (const function *)self;
    a values[MOST];
    if (refuse_count(flags, names, f->count) || read_values(given, f->count, values))
        return NULL;
    return PyLong_FromLong(run_unlocked(f->run, f->count, values));
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

/* A Prediction(layer, experts, scores), of that `type`, for each (layer, first, count) of `parts`, a tuple, of the numbers
 * that lie at `scores` and `experts`; fewer if one of those is negative. */
static PyObject *told(const float *scores, const int32_t *experts, PyObject *all, PyTypeObject *type) {
    const Py_ssize_t parts = PyTuple_GET_SIZE(all);
    PyObject *made = PyList_New(parts);
    for (Py_ssize_t i = 0; made && i < parts; i++) {
        PyObject *layer, *part = PyTuple_GET_ITEM(all, i);
        Py_ssize_t first, named;
        PyObject *one = NULL;
        if (PyArg_ParseTuple(part, "Onn", &layer, &first, &named)) {
            Py_ssize_t some = 0;
            while (some < named && experts[first + some] >= 0)
                some++;
            one = prediction(type, layer, numbers(experts + first, some, 0), numbers(scores + first, some, 1));
        }
        if (!one)
            Py_CLEAR(made);
        else
            PyList_SET_ITEM(made, i, one);
    }
    return made;
}

static int is_named_tuple(PyObject *type) {
    return PyType_Check(type) && PyType_IsSubtype((PyTypeObject *)type, &PyTuple_Type);
}

typedef void (*job)(void *context, int number);

/* Whether a prediction has begun, and who computes it. */
enum { NOT_BEGUN = 0, LEFT = 1, POSTED = 2 };

/* A prediction kernel of `count` arguments, the first `known` of them fixed, as are the two after the next `asked`.
 * `post` and `join`, of the kernels, have another thread run it. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    void *run;
    int (*post)(job fn, void *context, int64_t threads);
    void (*join)(void);
    int known, asked, count;
    int state, answer;
    a values[MOST];
    PyObject *parts, *type, *refused, *kept;
} asker;

/* What a kernel has begun to compute, and what is `kept` until it has: called once, it tells. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    asker *asked;
    PyObject *kept;
} begun;

static int read_question(const asker *f, PyObject *const *given, size_t flags, PyObject *names, a *values) {
    memcpy(values, f->values, sizeof f->values);
    /* the last argument is given, too */
    return refuse_count(flags, names, f->asked + 1) || read_values(given, f->asked, values + f->known) ||
           read_values(given + f->asked, 1, values + f->count - 1);
}

/* What the kernel told, or where its answer is not 0 what `refused` makes of that. */
static PyObject *read_answer(const asker *f, int answer) {
    if (answer)
        return PyObject_CallFunction(f->refused, "i", answer);
    const a *places = f->values + f->known + f->asked;
    return told((const float *)(uintptr_t)places[0], (const int32_t *)(uintptr_t)places[1], f->parts,
                (PyTypeObject *)f->type);
}

static void compute(void *context, int number) {
    (void)number;
    asker *f = context;
    f->answer = run(f->run, f->count, f->values);
}

/* Nobody wants the answer any more. */
static void drop(asker *f) {
    if (f->state == POSTED)
        f->join();
    f->state = NOT_BEGUN;
}

static PyObject *ask(PyObject *self, PyObject *const *given, size_t flags, PyObject *names) {
    asker *f = (asker *)self;
    a values[MOST];
    if (f->state != NOT_BEGUN)
        return PyErr_Format(PyExc_RuntimeError, "asked again before it told what it has begun");
    if (read_question(f, given, flags, names, values))
        return NULL;
    f->state = LEFT; /* the answer's place is taken till it is read */
    PyObject *found = read_answer(f, run_unlocked(f->run, f->count, values));
    f->state = NOT_BEGUN;
    return found;
}

static PyObject *tell(PyObject *self, PyObject *const *given, size_t flags, PyObject *names) {
    (void)given;
    begun *b = (begun *)self;
    asker *f = b->asked;
    if (refuse_count(flags, names, 0))
        return NULL;
    if (!f)
        return PyErr_Format(PyExc_RuntimeError, "what had begun was told before");
    b->asked = NULL;
    Py_BEGIN_ALLOW_THREADS
    if (f->state == POSTED)
        f->join();
    else
        compute(f, 0);
    Py_END_ALLOW_THREADS
    PyObject *found = read_answer(f, f->answer);
    f->state = NOT_BEGUN;
    Py_CLEAR(b->kept);
    Py_DECREF(f);
    return found;
}

/* Thrown away before it was called: the other thread is free again, and only then what is kept for it. */
static void free_begun(PyObject *self) {
    begun *b = (begun *)self;
    if (b->asked)
        drop(b->asked);
    Py_XDECREF(b->asked);
    Py_XDECREF(b->kept);
    Py_TYPE(self)->tp_free(self);
}

static PyTypeObject Begun = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "foregate.native._call.Begun",
    .tp_doc = "What an Asker has begun: called once, it tells; thrown away instead, it drops that.",
    .tp_basicsize = sizeof(begun),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_vectorcall_offset = offsetof(begun, call),
    .tp_call = PyVectorcall_Call,
    .tp_dealloc = free_begun,
};

/* begin(kept, *arguments): as a call, but whoever is idle computes, and what is returned tells. */
static PyObject *begin(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    asker *f = (asker *)self;
    a values[MOST];
    if (count < 1)
        return PyErr_Format(PyExc_TypeError, "begin takes what is to be kept, and then the arguments");
    if (f->state != NOT_BEGUN)
        return PyErr_Format(PyExc_RuntimeError, "begun again before it was told");
    if (read_question(f, given + 1, (size_t)count - 1, NULL, values))
        return NULL;
    begun *made = (begun *)Begun.tp_alloc(&Begun, 0);
    if (!made)
        return NULL;
    const int64_t threads = values[f->count - 1];
    values[f->count - 1] = 1;
    memcpy(f->values, values, sizeof values);
    made->call = tell;
    made->asked = (asker *)Py_NewRef(self);
    made->kept = Py_NewRef(given[0]);
    f->state = f->post(compute, f, threads) ? POSTED : LEFT;
    return (PyObject *)made;
}

/* Asker(address, known, asked, places, parts, Prediction, refused, post, join, kept): calls the function at `address` with
 * the tuple `known`, then `asked` arguments and a last one (threads) that are given, and between those the tuple
 * `places`, where its answer will lie. An answer that is not 0 goes to `refused`. `kept` lives as long. */
static PyObject *make_asker(PyTypeObject *type, PyObject *given, PyObject *named) {
    unsigned long long address, post, join;
    int asked;
    PyObject *known, *places, *parts, *prediction, *refused, *kept;
    static char *names[] = {"address", "known", "asked", "places", "parts", "prediction",
                            "refused", "post", "join", "kept", NULL};
    if (!PyArg_ParseTupleAndKeywords(given, named, "KO!iO!O!OOKKO", names, &address, &PyTuple_Type, &known, &asked,
                                     &PyTuple_Type, &places, &PyTuple_Type, &parts, &prediction, &refused, &post, &join,
                                     &kept))
        return NULL;
    const Py_ssize_t first = PyTuple_GET_SIZE(known), count = first + asked + 3;
    if (!address || !post || !join || asked < 0 || PyTuple_GET_SIZE(places) != 2 || count > MOST || !can_run((int)count) ||
        !is_named_tuple(prediction))
        return PyErr_Format(PyExc_ValueError, "a function at %llu of %zd arguments", address, count);
    asker *made = (asker *)type->tp_alloc(type, 0);
    if (!made)
        return NULL;
    made->call = ask;
    made->run = (void *)(uintptr_t)address;
    made->post = (int (*)(job, void *, int64_t))(uintptr_t)post;
    made->join = (void (*)(void))(uintptr_t)join;
    made->known = (int)first;
    made->asked = asked;
    made->count = (int)count;
    made->parts = Py_NewRef(parts);
    made->type = Py_NewRef(prediction);
    made->refused = Py_NewRef(refused);
    made->kept = Py_NewRef(kept);
    if (read_tuple(known, made->values) || read_tuple(places, made->values + first + asked))
        Py_CLEAR(made);
    return (PyObject *)made;
}

/* Whatever it has begun holds it, so that nothing has. */
static void free_asker(PyObject *self) {
    Py_XDECREF(((asker *)self)->parts);
    Py_XDECREF(((asker *)self)->type);
    Py_XDECREF(((asker *)self)->refused);
    Py_XDECREF(((asker *)self)->kept);
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef asker_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL,
     "begin(kept, *arguments): as a call, but whoever is idle computes, and what is returned tells; `kept` lives as long."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef asker_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(asker, call), READONLY, NULL},
    {"open", T_INT, offsetof(asker, state), READONLY, "Whether something has begun and was not told."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject Asker = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "foregate.native._call.Asker",
    .tp_doc = "Asker(address, known, asked, places, parts, Prediction, refused, post, join, kept): a kernel's predictions "
              "in one call.",
    .tp_basicsize = sizeof(asker),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(asker, call),
    .tp_call = PyVectorcall_Call,
    .tp_members = asker_members,
    .tp_methods = asker_methods,
    .tp_new = make_asker,
    .tp_dealloc = free_asker,
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_call", .m_size = -1};

PyMODINIT_FUNC PyInit__call(void) {
    if (PyType_Ready(&Function) < 0 || PyType_Ready(&Asker) < 0 || PyType_Ready(&Begun) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddObjectRef(made, "Function", (PyObject *)&Function) < 0 ||
                 PyModule_AddObjectRef(made, "Asker", (PyObject *)&Asker) < 0 ||
                 PyModule_AddIntConstant(made, "VERSION", 5) < 0))
        Py_CLEAR(made);
    return made;
}
