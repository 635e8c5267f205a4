/* Whole experts by io_uring from one thread: to be measured against the threads of reads.c (foregate.experts.read_paths),
   used by nothing else. Raw system calls, so that no library is needed. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define HAS_URING
#endif
#endif

#ifdef HAS_URING
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_SLOTS 64

typedef struct {
    int fd;
    struct io_uring_params layout;
    uint8_t *submissions, *completions; /* rings, as the kernel lays them out: see io_uring_setup(2) */
    size_t submissions_size, completions_size, entries_size;
    struct io_uring_sqe *entries;
    unsigned filled; /* entries that the kernel has not been told of */
} ring;

/* What is read: pieces of nbytes at offsets, in chunks, to slots one after another. */
typedef struct {
    int fd, fixed;
    const int64_t *offsets;
    int64_t count, nbytes, chunk, slots;
    uint8_t *memory;
} plan;

static void *map(int fd, size_t size, off_t at)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);
}

static int ring_open(ring *made, unsigned depth)
{
    memset(made, 0, sizeof *made);
    made->fd = (int)syscall(__NR_io_uring_setup, depth, &made->layout);
    if (made->fd < 0) return -errno;
    const struct io_sqring_offsets *out = &made->layout.sq_off;
    const struct io_cqring_offsets *in = &made->layout.cq_off;
    made->submissions_size = out->array + made->layout.sq_entries * sizeof(unsigned);
    made->completions_size = in->cqes + made->layout.cq_entries * sizeof(struct io_uring_cqe);
    made->entries_size = made->layout.sq_entries * sizeof(struct io_uring_sqe);
    made->submissions = map(made->fd, made->submissions_size, IORING_OFF_SQ_RING);
    made->completions = map(made->fd, made->completions_size, IORING_OFF_CQ_RING);
    made->entries = map(made->fd, made->entries_size, IORING_OFF_SQES);
    return made->submissions == MAP_FAILED || made->completions == MAP_FAILED || made->entries == MAP_FAILED ? -errno : 0;
}

static void ring_close(ring *made)
{
    if (made->submissions && made->submissions != MAP_FAILED) munmap(made->submissions, made->submissions_size);
    if (made->completions && made->completions != MAP_FAILED) munmap(made->completions, made->completions_size);
    if (made->entries && made->entries != MAP_FAILED) munmap(made->entries, made->entries_size);
    if (made->fd >= 0) close(made->fd);
}

/* Buffers and file once, so that no read has to look them up. */
static int ring_register(ring *made, plan *what)
{
    struct iovec slots[MOST_SLOTS]; /* one each: a buffer may have 1 GiB */
    for (int slot = 0; slot < what->slots; slot++)
        slots[slot] = (struct iovec){what->memory + slot * what->nbytes, (size_t)what->nbytes};
    if (syscall(__NR_io_uring_register, made->fd, IORING_REGISTER_BUFFERS, slots, (unsigned)what->slots) < 0) return -errno;
    if (syscall(__NR_io_uring_register, made->fd, IORING_REGISTER_FILES, &what->fd, 1) < 0) return -errno;
    return 0;
}

static unsigned *word(uint8_t *area, unsigned at) { return (unsigned *)(area + at); }

static int64_t chunks_of(const plan *what) { return (what->nbytes + what->chunk - 1) / what->chunk; }

static void ring_add(ring *made, const plan *what, int64_t number)
{
    const struct io_sqring_offsets *at = &made->layout.sq_off;
    unsigned tail = *word(made->submissions, at->tail), index = tail & *word(made->submissions, at->ring_mask);
    struct io_uring_sqe *entry = &made->entries[index];
    int64_t piece = number / chunks_of(what), from = number % chunks_of(what) * what->chunk, slot = piece % what->slots;
    int64_t size = what->nbytes - from < what->chunk ? what->nbytes - from : what->chunk;
    memset(entry, 0, sizeof *entry);
    entry->opcode = what->fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
    entry->flags = what->fixed ? IOSQE_FIXED_FILE : 0;
    entry->fd = what->fixed ? 0 : what->fd; /* a registered file is told by its number */
    entry->buf_index = what->fixed ? (uint16_t)slot : 0;
    entry->addr = (uintptr_t)(what->memory + slot * what->nbytes + from);
    entry->len = (uint32_t)size;
    entry->off = (uint64_t)(what->offsets[piece] + from);
    entry->user_data = (uint64_t)size; /* what its completion must tell */
    word(made->submissions, at->array)[index] = index;
    __atomic_store_n(word(made->submissions, at->tail), tail + 1, __ATOMIC_RELEASE);
    made->filled++;
}

/* Submit what was added and wait for one completion. */
static int ring_enter(ring *made)
{
    for (;;) {
        long submitted = syscall(__NR_io_uring_enter, made->fd, made->filled, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (submitted >= 0) {
            made->filled -= (unsigned)submitted;
            return 0;
        }
        if (errno != EINTR && errno != EAGAIN && errno != EBUSY) return -errno;
    }
}

/* Completions taken; `failed` where one has failed, or came short, which is none that we measure. */
static int ring_take(ring *made, int *failed)
{
    const struct io_cqring_offsets *at = &made->layout.cq_off;
    unsigned head = *word(made->completions, at->head), mask = *word(made->completions, at->ring_mask);
    int taken = 0;
    for (; head != __atomic_load_n(word(made->completions, at->tail), __ATOMIC_ACQUIRE); head++, taken++) {
        const struct io_uring_cqe *done = (struct io_uring_cqe *)(made->completions + at->cqes) + (head & mask);
        if (done->res < 0)
            *failed = done->res;
        else if ((uint64_t)done->res != done->user_data)
            *failed = -EIO;
    }
    __atomic_store_n(word(made->completions, at->head), head, __ATOMIC_RELEASE);
    return taken;
}

static int drive(ring *made, const plan *what, int64_t depth)
{
    int64_t chunks = what->count * chunks_of(what), begun = 0, done = 0;
    int failed = 0;
    while (done < (failed ? begun : chunks)) { /* what is in flight writes to memory: it is waited for in any case */
        while (!failed && begun < chunks && begun - done < depth) ring_add(made, what, begun++);
        int refused = ring_enter(made);
        if (refused) return refused;
        done += ring_take(made, &failed);
    }
    return failed;
}

static double seconds(struct timespec at) { return (double)at.tv_sec + (double)at.tv_nsec * 1e-9; }

static double wall(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return seconds(now);
}

/* Of the whole process: the kernel may read in threads of its own, which count there. */
static double processor(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return seconds(now);
}
#endif

/* Read `count` pieces of `nbytes` at `offsets` of `fd`, `depth` chunks at a time, to `slots` places in `memory`.
   `took`: seconds, and of processor time, without making and registering. 0, or a negated errno: ENOSYS where there is
   no io_uring, EPERM where it is forbidden, EIO where the file is too short. */
int uring_read(int fd, const int64_t *offsets, int64_t count, int64_t nbytes, int64_t chunk, int32_t depth, void *memory,
               int64_t slots, int32_t fixed, double *took)
{
#ifdef HAS_URING
    ring made;
    plan what = {fd, fixed, offsets, count, nbytes, chunk, slots < MOST_SLOTS ? slots : MOST_SLOTS, memory};
    int failed = ring_open(&made, (unsigned)depth);
    if (!failed && fixed) failed = ring_register(&made, &what);
    took[0] = -wall(), took[1] = -processor();
    if (!failed) failed = drive(&made, &what, depth);
    took[0] += wall(), took[1] += processor();
    ring_close(&made);
    return failed;
#else
    (void)fd, (void)offsets, (void)count, (void)nbytes, (void)chunk, (void)depth, (void)memory, (void)slots, (void)fixed;
    (void)took;
    return -ENOSYS;
#endif
}
