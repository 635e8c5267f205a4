/* A small pool of compute threads that share the chunks of one job at a time. No OpenMP: its threads spin.
 *
 * Every thread owns a range of chunks, so that it reads memory forwards, and takes from the far end of another's
 * range when its own is used up: a thread that the system has taken off its core holds up one chunk, not half of the
 * job. Who computes a chunk never reaches the arithmetic. */
#ifndef FOREGATE_POOL_H
#define FOREGATE_POOL_H

#include <stdint.h>

#define MAX_THREADS 64

typedef void (*chunk_fn)(void *context, int chunk);

/* Run fn(context, 0 ... chunks-1) on up to `threads` threads, the caller's included; returns when all have run. */
static void pool_run(chunk_fn fn, void *context, int chunks, int threads);

/* Have fn(context, 0) run by another of `threads` threads, before chunks of jobs, while the caller goes on; 0, and
 * nothing done, where there is none or something is posted already. Whoever posts joins. */
static int pool_post(chunk_fn fn, void *context, int threads);

/* Returns when what was posted has run: by the caller, if nobody has begun it. Until then it helps with other jobs. */
static void pool_join(void);

/* A job of several parts, the first of which others begin while the caller does something else: how many threads there
 * are for it, the caller's included, or 0 where there is no other. Whoever claims hands out chunks, runs what is left of
 * them, hands out more ..., and releases. */
static int pool_claim(int threads);
static void pool_hand_out(chunk_fn fn, void *context, int chunks, int threads);
static void pool_run_rest(void);
/* ns in which any thread has computed a chunk, so far. */
static int64_t pool_busy(void);
static void pool_release(void);

/* Whoever has handed out goes on with something else, and comes back: whether the pool is still its own. It is, unless it
 * has left in between, so that nobody is sure of its return: then whoever needs the pool takes it once those chunks have
 * run. */
static void pool_keep(void);
static void pool_leave(void);
static int pool_return(void);

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPINS 4000 /* about 110 us: the engine asks again within that while a layer runs */
#define PATIENCE 6000 /* about 160 us, for the last chunk of others */

typedef struct {
    _Alignas(64) _Atomic uint64_t range; /* next << 32 | end */
} span;

static struct {
    _Atomic int in_use; /* by the caller of the running job */
    _Atomic int kept;   /* by a caller that is away: HELD or LEFT */
    _Atomic int workers;
    chunk_fn fn;
    void *context;
    _Alignas(64) _Atomic uint32_t generation; /* of jobs; what idle workers sleep on */
    _Atomic int threads;                      /* taking part in the running job */
    _Atomic int sleepers;
    _Alignas(64) _Atomic int pending; /* chunks that have not ended */
    _Atomic int inside;               /* threads that compute a chunk */
    _Atomic int64_t busy, busy_since; /* for how many ns any has, without the time since the first of those began */
    span spans[MAX_THREADS];
} pool;

enum { HELD = 1, LEFT };

enum { NOTHING, BEING_POSTED, WAITING, RUNNING, DONE };

static struct {
    _Alignas(64) _Atomic int state;
    chunk_fn fn;
    void *context;
} posted;

static __thread int64_t helped; /* ns that pool_join has spent on chunks of others */
static _Atomic int forks;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int take_from(int owner, int front) {
    _Atomic uint64_t *range = &pool.spans[owner].range;
    uint64_t seen = atomic_load_explicit(range, memory_order_acquire);
    for (;;) {
        uint32_t next = (uint32_t)(seen >> 32), end = (uint32_t)seen;
        if (next >= end)
            return -1;
        uint64_t left = front ? (uint64_t)(next + 1) << 32 | end : (uint64_t)next << 32 | (end - 1);
        if (atomic_compare_exchange_weak_explicit(range, &seen, left, memory_order_acq_rel, memory_order_acquire))
            return (int)(front ? next : end - 1);
    }
}

static int take(int me, int threads) {
    int chunk = take_from(me, 1);
    for (int i = 1; chunk < 0 && i < threads; i++)
        chunk = take_from((me + i) % threads, 0);
    return chunk;
}

static int posted_becomes(int from, int to) { return atomic_compare_exchange_strong(&posted.state, &from, to); }

/* What is posted, if nobody has begun it. */
static void run_posted(void) {
    if (atomic_load_explicit(&posted.state, memory_order_relaxed) == WAITING && posted_becomes(WAITING, RUNNING)) {
        posted.fn(posted.context, 0);
        atomic_store_explicit(&posted.state, DONE, memory_order_release);
    }
}

/* A chunk that has been taken keeps its job's fn and context in place until it is counted off. */
static int work_once(int me, int threads) {
    int chunk = take(me, threads);
    if (chunk < 0)
        return 0;
    if (!atomic_fetch_add(&pool.inside, 1))
        atomic_store(&pool.busy_since, now_ns());
    pool.fn(pool.context, chunk);
    const int64_t took = now_ns() - atomic_load(&pool.busy_since); /* read before anybody else can write it */
    if (atomic_fetch_sub(&pool.inside, 1) == 1)
        atomic_fetch_add(&pool.busy, took);
    atomic_fetch_sub_explicit(&pool.pending, 1, memory_order_release);
    return 1;
}

static void work(int me, int threads) {
    while (work_once(me, threads))
        if (me)
            run_posted();
}

static void *worker(void *argument) {
    int me = (int)(intptr_t)argument;
    uint32_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.generation, memory_order_acquire) == seen; i++)
            pause_cpu();
        if (atomic_load(&pool.generation) == seen) {
            atomic_fetch_add(&pool.sleepers, 1);
            syscall(SYS_futex, &pool.generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&pool.sleepers, 1);
            continue;
        }
        seen = atomic_load(&pool.generation);
        run_posted();
        int threads = atomic_load(&pool.threads);
        if (me < threads)
            work(me, threads);
    }
    return NULL;
}

static void in_forked_child(void) { /* no worker came along, and nobody holds the lock but one who has left */
    if (atomic_load(&pool.kept))
        atomic_store(&pool.kept, LEFT);
    atomic_store(&pool.in_use, atomic_load(&pool.kept) != 0);
    pool.workers = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.pending, 0);
    atomic_store(&pool.inside, 0);
    for (int i = 0; i < MAX_THREADS; i++)
        atomic_store(&pool.spans[i].range, 0);
    atomic_fetch_add(&forks, 1);
    posted_becomes(RUNNING, WAITING); /* whoever joins runs it again */
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, in_forked_child); }

/* Threads that can take part, after starting those that are missing. Signals stay with the program's own threads. */
static int hire(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (threads - 1 <= pool.workers)
        return threads;
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 512 << 10);
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)(pool.workers + 1)))
            break;
        pool.workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool.workers + 1 < threads ? pool.workers + 1 : threads;
}

/* The i-th time. */
static void rest(int i) {
    if (i < PATIENCE)
        pause_cpu();
    else
        sched_yield(); /* whoever has the last chunk may wait for this core */
}

static void wait_for_others(void) {
    for (int i = 0; atomic_load_explicit(&pool.pending, memory_order_acquire) > 0; i++)
        rest(i);
}

/* Workers look for something to do, `most` of those that sleep. */
static void call_workers(int most) {
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleepers))
        syscall(SYS_futex, &pool.generation, FUTEX_WAKE_PRIVATE, most, NULL, NULL, 0);
}

/* Hand out `chunks` among `threads`. */
static void start(chunk_fn fn, void *context, int chunks, int threads) {
    pool.fn = fn;
    pool.context = context;
    atomic_store(&pool.pending, chunks);
    atomic_store(&pool.threads, threads);
    for (int i = 0; i < threads; i++) {
        uint64_t begin = (uint64_t)chunks * i / threads, end = (uint64_t)chunks * (i + 1) / threads;
        atomic_store_explicit(&pool.spans[i].range, begin << 32 | end, memory_order_release);
    }
    call_workers(pool.workers);
}

static int kept_becomes(int from, int to) { return atomic_compare_exchange_strong(&pool.kept, &from, to); }

static void pool_keep(void) { atomic_store(&pool.kept, HELD); }

static void pool_leave(void) { kept_becomes(HELD, LEFT); }

static int pool_return(void) { return kept_becomes(HELD, 0) || kept_becomes(LEFT, 0); }

/* The pool, if nobody uses it. */
static int seize(void) {
    if (!atomic_exchange(&pool.in_use, 1))
        return 1;
    if (atomic_load(&pool.pending) || !kept_becomes(LEFT, 0))
        return 0;
    if (!atomic_load(&pool.pending))
        return 1;
    atomic_store(&pool.kept, LEFT); /* that was another job already */
    return 0;
}

static void pool_run(chunk_fn fn, void *context, int chunks, int threads) {
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads > chunks)
        threads = chunks;
    if (threads <= 1 || !seize()) { /* in use by another thread: alone, same result */
        for (int chunk = 0; chunk < chunks; chunk++)
            fn(context, chunk);
        return;
    }
    threads = hire(threads);
    start(fn, context, chunks, threads);
    work(0, threads);
    wait_for_others();
    atomic_store(&pool.in_use, 0);
}

static void pool_release(void) { atomic_store(&pool.in_use, 0); }

static int pool_claim(int threads) {
    if (threads <= 1 || !seize())
        return 0;
    threads = hire(threads < MAX_THREADS ? threads : MAX_THREADS);
    if (threads <= 1)
        pool_release();
    return threads > 1 ? threads : 0;
}

static void pool_hand_out(chunk_fn fn, void *context, int chunks, int threads) {
    start(fn, context, chunks, threads);
}

static void pool_run_rest(void) {
    work(0, atomic_load(&pool.threads));
    wait_for_others();
}

static int64_t pool_busy(void) {
    const int64_t since = atomic_load(&pool.busy_since), before = atomic_load(&pool.busy);
    return before + (atomic_load(&pool.inside) ? now_ns() - since : 0);
}

static int pool_post(chunk_fn fn, void *context, int threads) {
    helped = 0;
    if (threads <= 1)
        return 0;
    if (!pool.workers) {
        if (!pool_claim(threads))
            return 0;
        pool_release();
    }
    if (!posted_becomes(NOTHING, BEING_POSTED))
        return 0;
    posted.fn = fn;
    posted.context = context;
    atomic_store_explicit(&posted.state, WAITING, memory_order_release);
    call_workers(1);
    return 1;
}

static void pool_join(void) {
    helped = 0;
    run_posted();
    for (int i = 0; atomic_load_explicit(&posted.state, memory_order_acquire) != DONE;) {
        const int64_t began = now_ns();
        if (work_once(0, atomic_load(&pool.threads)))
            helped += now_ns() - began;
        else
            rest(i++);
    }
    atomic_store(&posted.state, NOTHING);
}

#endif
