/* heapq's and bisect's functions as they are called by compiled code: see compiled_caches.h, which includes this. */

/* ---- heapq's functions on lists of tuples that begin with numbers -------------------------------------------------- */

/* As heapq has it in C, with the comparisons of tuples and of integers done here. Any other comparison is Python's. */

static int entry_is_less(PyObject *a, PyObject *b) { /* -1: an exception */
    Py_ssize_t size = Py_MIN(PyTuple_GET_SIZE(a), PyTuple_GET_SIZE(b));
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
        if (x == y) {
            continue;
        }
        if (PyLong_CheckExact(x) && PyLong_CheckExact(y)) {
            int order = integer_order(x, y);
            if (order != 0) {
                return order < 0;
            }
            continue;
        }
        int is_equal = PyObject_RichCompareBool(x, y, Py_EQ);
        if (is_equal != 1) {
            return is_equal < 0 ? -1 : PyObject_RichCompareBool(x, y, Py_LT);
        }
    }
    return PyTuple_GET_SIZE(a) < PyTuple_GET_SIZE(b);
}

/* What no integer decides is asked of Python, which may change the heap: hence references of our own. */
static int heap_asks(PyListObject *heap, Py_ssize_t size, PyObject *a, PyObject *b) {
    Py_INCREF(a);
    Py_INCREF(b);
    int is_less = PyTuple_CheckExact(a) && PyTuple_CheckExact(b) ? entry_is_less(a, b) : PyObject_RichCompareBool(a, b, Py_LT);
    Py_DECREF(a);
    Py_DECREF(b);
    if (is_less >= 0 && Py_SIZE(heap) != size) {
        PyErr_SetString(PyExc_RuntimeError, "list changed size during iteration");
        return -1;
    }
    return is_less;
}

static inline int heap_is_less(PyListObject *heap, Py_ssize_t size, PyObject *a, PyObject *b) {
    if (PyTuple_CheckExact(a) && PyTuple_CheckExact(b) && PyTuple_GET_SIZE(a) > 0 && PyTuple_GET_SIZE(b) > 0) {
        PyObject *x = PyTuple_GET_ITEM(a, 0), *y = PyTuple_GET_ITEM(b, 0);
        if (PyLong_CheckExact(x) && PyLong_CheckExact(y)) {
            int order = integer_order(x, y);
            if (order != 0) {
                return order < 0;
            }
        }
    }
    return heap_asks(heap, size, a, b);
}

static int heap_sift_down(PyListObject *heap, Py_ssize_t start, Py_ssize_t at) {
    Py_ssize_t size = Py_SIZE(heap);
    while (at > start) {
        Py_ssize_t parent = (at - 1) >> 1;
        int is_less = heap_is_less(heap, size, heap->ob_item[at], heap->ob_item[parent]);
        if (is_less <= 0) {
            return is_less;
        }
        PyObject **items = heap->ob_item, *item = items[at];
        items[at] = items[parent];
        items[parent] = item;
        at = parent;
    }
    return 0;
}

static int heap_sift_up(PyListObject *heap) {
    Py_ssize_t size = Py_SIZE(heap), at = 0;
    while (at < size >> 1) {
        Py_ssize_t child = 2 * at + 1;
        if (child + 1 < size) {
            int is_less = heap_is_less(heap, size, heap->ob_item[child], heap->ob_item[child + 1]);
            if (is_less < 0) {
                return -1;
            }
            child += !is_less;
        }
        PyObject **items = heap->ob_item, *item = items[child];
        items[child] = items[at];
        items[at] = item;
        at = child;
    }
    return heap_sift_down(heap, 0, at);
}

static PyObject *heap_push(PyObject *heap, PyObject *item) {
    if (PyList_Append(heap, item) < 0 || heap_sift_down((PyListObject *)heap, 0, PyList_GET_SIZE(heap) - 1) < 0) {
        return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyObject *heap_pop(PyObject *heap) { /* of a heap that is not empty */
    Py_ssize_t last = PyList_GET_SIZE(heap) - 1;
    PyObject *item = PyList_GET_ITEM(heap, last);
    Py_ssize_t allocated = ((PyListObject *)heap)->allocated;
    if (last > allocated >> 1 || allocated <= 64) { /* list.pop would not give memory back either, or little */
        Py_SET_SIZE((PyListObject *)heap, last);
    } else {
        Py_INCREF(item);
        if (PyList_SetSlice(heap, last, last + 1, NULL) < 0) {
            Py_DECREF(item);
            return NULL;
        }
    }
    if (last == 0) {
        return item;
    }
    PyObject *least = PyList_GET_ITEM(heap, 0);
    PyList_SET_ITEM(heap, 0, item);
    if (heap_sift_up((PyListObject *)heap) < 0) {
        Py_DECREF(least);
        return NULL;
    }
    return least;
}

/* ---- bisect's functions on a tuple or list of integers ------------------------------------------------------------ */

/* The place of `item`, behind those equal to it if `is_right`; -1: not only integers, or an exception. */
static Py_ssize_t place_among_integers(PyObject *items, PyObject *item, int is_right) {
    if (!(PyTuple_CheckExact(items) || PyList_CheckExact(items)) || !PyLong_CheckExact(item)) {
        return -1;
    }
    PyObject **all = PySequence_Fast_ITEMS(items); /* integers are compared without calling anything that may change it */
    Py_ssize_t low = 0, high = PySequence_Fast_GET_SIZE(items);
    while (low < high) {
        Py_ssize_t middle = (low + high) >> 1;
        if (!PyLong_CheckExact(all[middle])) {
            return -1;
        }
        if (is_right ? integer_order(item, all[middle]) < 0 : integer_order(all[middle], item) >= 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}
