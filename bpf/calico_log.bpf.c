/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * calico_log: each line that any BPF program prints, at its place in the order of events.
 *
 * Hook: raw tracepoint bpf_trace_printk (Linux 5.9 and later), in the context of the printing program.
 * With LOG_STREAM every line is sent; without it a flight recorder keeps the last RECORDER_LINES of each CPU,
 * and the drop and hop collectors send those that led to a probe packet's event.
 * Cost: one copy of the line; nothing at all while no program prints.
 */
struct recorder_cursor {
	u64 next; /* lines ever recorded on this CPU */
	u64 sent; /* all before this one were sent or discarded */
	u32 lost; /* lines that found no room since the last that did */
};
BPF_PERCPU_ARRAY(recorder, struct log_event, RECORDER_LINES);
BPF_PERCPU_ARRAY(recorder_cursors, struct recorder_cursor, 1);

static __always_inline void send_line(struct recorder_cursor *cursor, struct log_event *e, u64 flags)
{
	u32 length = e->text_bytes;

	if (length > TEXT_BYTES)
		length = TEXT_BYTES;
	e->lost = cursor->lost;
	if (events.ringbuf_output(e, sizeof(*e) - TEXT_BYTES + length, flags)) {
		cursor->lost++;
		count_shared(STAT_LOG_LOST, 1);
		sent(WAKE_BYTES);
	} else {
		cursor->lost = 0;
		count_shared(STAT_LOG_SENT, 1);
	}
}

/* Returns the bytes that the line takes with its NUL, in the room of TEXT_BYTES; 0 when a helper can read none. */
static __always_inline u32 read_line(u8 *to, u64 from)
{
#ifdef RDONLY_CAST
	const u64 ones = 0x0101010101010101ULL, high_bits = 0x8080808080808080ULL;

#pragma clang loop unroll(disable)
	for (u32 at = 0; at < TEXT_BYTES; at += 8) {
		u64 word = word_at(from + at);
		u64 ends = (word - ones) & ~word & high_bits; /* the lowest bit that is set is of the first NUL */

		*(u64 *)(to + at) = word;
		if (ends)
			return at + 1 + (((ends & -ends) >> 7) * 0x0001020304050607ULL >> 56);
	}
	to[TEXT_BYTES - 1] = 0;
	return TEXT_BYTES;
#else
	int length = bpf_probe_read_kernel_str(to, TEXT_BYTES, (void *)from);

	return length > 0 ? length : 0;
#endif
}

/* The name of the running task, as bpf_get_current_comm gives it. */
static __always_inline void read_comm(struct log_event *e)
{
#if defined(RDONLY_CAST) && defined(HAVE_TASK_STRUCT_COMM)
	u64 at = bpf_get_current_task() + __builtin_offsetof(struct task_struct, comm);

	*(u64 *)e->comm = word_at(at);
	*(u64 *)(e->comm + 8) = word_at(at + 8);
#else
	bpf_get_current_comm(e->comm, sizeof(e->comm));
#endif
}

int collect_log(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0, slot;
	struct recorder_cursor *cursor = recorder_cursors.lookup(&zero);
	struct log_event *e;
	u64 task = bpf_get_current_pid_tgid();
	u32 length;

	if (!cursor)
		return 0;
	slot = cursor->next & (RECORDER_LINES - 1);
	e = recorder.lookup(&slot);
	if (!e)
		return 0;
	length = read_line(e->text, ctx->args[0]);
	if (!length)
		return 0;
	e->ktime_ns = bpf_ktime_get_ns();
	e->type = EVENT_LOG;
	e->cpu = bpf_get_smp_processor_id();
	e->pid = task;
	e->text_bytes = length - 1;
	read_comm(e);
	count(STAT_LOG_SEEN, 1);
#ifdef LOG_STREAM
	send_line(cursor, e, wakeup(sizeof(*e) - TEXT_BYTES + length));
#else
	cursor->next++;
#endif
	return 0;
}

/* Forget the lines so far: what follows on this CPU belongs to the packet that was just seen to arrive. */
static __always_inline void recorder_restart(void)
{
	u32 zero = 0;
	struct recorder_cursor *cursor = recorder_cursors.lookup(&zero);

	if (cursor)
		cursor->sent = cursor->next;
}

/* Send line *at*. Returns 0 when there is none, which cannot be. */
static __always_inline int send_recorded(struct recorder_cursor *cursor, u64 at)
{
	u32 slot = at & (RECORDER_LINES - 1);
	struct log_event *e = recorder.lookup(&slot);

	if (e)
		send_line(cursor, e, BPF_RB_NO_WAKEUP);
	return e != NULL;
}

/* Send the lines recorded on this CPU since the last restart or flush: at most RECORDER_LINES. */
static __always_inline void recorder_flush(void)
{
	u32 zero = 0;
	struct recorder_cursor *cursor = recorder_cursors.lookup(&zero);
	u64 at, end;

	if (!cursor)
		return;
	at = cursor->sent;
	end = cursor->next;
	cursor->sent = end;
	if (end - at > RECORDER_LINES) {
		count_shared(STAT_LOG_OVERWRITTEN, end - at - RECORDER_LINES);
		at = end - RECORDER_LINES;
	}
#ifdef NUM_NEW
	/* Linux 6.4: the verifier follows this loop twice, and the one below RECORDER_LINES times, which takes 60 ms */
	u64 numbers;
	int (*new)(u64 *numbers, int first, int end) = (void *)(KFUNC_CALL + NUM_NEW);
	int *(*next)(u64 *numbers) = (void *)(KFUNC_CALL + NUM_NEXT);
	void (*destroy)(u64 *numbers) = (void *)(KFUNC_CALL + NUM_DESTROY);

	new(&numbers, 0, RECORDER_LINES);
	while (next(&numbers) && at < end && send_recorded(cursor, at++))
		;
	destroy(&numbers);
#else
#pragma clang loop unroll(disable)
	for (int i = 0; i < RECORDER_LINES && at < end && send_recorded(cursor, at); i++)
		at++;
#endif
}
