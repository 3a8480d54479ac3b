/* A TCG plugin for qemu-aarch64: counts the executed guest instructions by class.
 *
 * The guest sets a mark by close(MARK + k), which fails and changes nothing; at each mark a line of JSON is written to the
 * file named by out=. Only the thread that sets the marks is counted: runtimes keep others that wake now and then.
 * Written against QEMU's plugin interface, version 1 (docs/devel/tcg-plugins.rst), which needs no header of qemu's here. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t id_t_;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct {
  const char *target_name;
  struct { int min, cur; } version;
  bool system_emulation;
  struct { int smp_vcpus, max_vcpus; } system;
} info_t_;
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(id_t_, void (*)(id_t_, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_syscall_cb(
    id_t_, void (*)(id_t_, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

enum { CLOSE = 57, MARK = 0x7e570000, READS_NO_REGISTERS = 0 };

/* Arm Architecture Reference Manual for A-profile, C4: the first row that fits is an instruction's class; alike names adjoin. */
static struct { const char *name; uint32_t mask, value; uint64_t count; } classes[] = {
  {"dot_i8", 0x9fe0fc00, 0x0e809400},       /* SDOT, UDOT: vectors */
  {"dot_i8", 0x9fc0f400, 0x0f80e000},       /* by element */
  {"dot_i8", 0xbfe0fc00, 0x0e809c00},       /* USDOT */
  {"dot_i8", 0xbf40f400, 0x0f00f000},       /* USDOT, SUDOT by element */
  {"mmla_i8", 0xdfe0fc00, 0x4e80a400},      /* SMMLA, UMMLA */
  {"mmla_i8", 0xffe0fc00, 0x4e80ac00},      /* USMMLA */
  {"fmla_f32", 0xbfa0fc00, 0x0e20cc00},     /* FMLA, single or double */
  {"fmla_f32", 0xbf80f400, 0x0f801000},
  {"fmla_f16", 0xbfe0fc00, 0x0e400c00},
  {"fmla_f16", 0xbfc0f400, 0x0f001000},
  {"bf16", 0xffe0fc00, 0x6e40ec00},         /* BFMMLA */
  {"bf16", 0xbfe0fc00, 0x2e40fc00},         /* BFDOT */
  {"mul_long", 0x9f20fc00, 0x0e208000},     /* SMLAL, UMLAL */
  {"mul_long", 0x9f20fc00, 0x0e20c000},     /* SMULL, UMULL */
  {"mul_long", 0x9f00f400, 0x0f002000},
  {"mul_long", 0x9f00f400, 0x0f00a000},
  {"add_long", 0x9f3ffc00, 0x0e206800},     /* SADALP, UADALP */
  {"sve", 0x1e000000, 0x04000000},
  {"sme", 0x9e000000, 0x80000000},
  {"simd_other", 0x0e000000, 0x0e000000},   /* all else of Advanced SIMD and floating point */
  {"load_store", 0x0a000000, 0x08000000},
  {"branch_system", 0x1c000000, 0x14000000},
  {"integer", 0x1c000000, 0x10000000},      /* with an immediate */
  {"integer", 0x0e000000, 0x0a000000},      /* with registers */
  {"other", 0, 0},
};
enum { CLASSES = sizeof classes / sizeof *classes };

struct block { int rows; struct { int class, count; } row[]; }; /* how many instructions of which classes it has */

static FILE *out;
static unsigned marking; /* the thread */
static bool marked;

static void executed(unsigned thread, void *data) {
  const struct block *block = data;
  if (!marked || thread != marking) return;
  for (int i = 0; i < block->rows; i++) classes[block->row[i].class].count += block->row[i].count;
}

static void translated(id_t_ id, struct qemu_plugin_tb *tb) {
  int counts[CLASSES] = {0}, rows = 0;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
    uint32_t code;
    int c = 0;
    memcpy(&code, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
    while ((code & classes[c].mask) != classes[c].value) c++;
    rows += !counts[c]++;
  }
  struct block *block = malloc(sizeof *block + rows * sizeof *block->row); /* as long as the program runs */
  block->rows = 0;
  for (int c = 0; c < CLASSES; c++)
    if (counts[c]) {
      block->row[block->rows].class = c;
      block->row[block->rows++].count = counts[c];
    }
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, READS_NO_REGISTERS, block);
}

static void called(id_t_ id, unsigned thread, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
                   uint64_t f, uint64_t g, uint64_t h) {
  if (number != CLOSE || (a & 0xffff0000u) != MARK) return;
  marking = thread;
  marked = true;
  fprintf(out, "{\"mark\": %" PRIu64 ", \"classes\": {", a & 0xffff);
  for (int i = 0; i < CLASSES;) {
    const char *name = classes[i].name;
    uint64_t sum = 0;
    fprintf(out, "%s\"%s\": ", i ? ", " : "", name);
    for (; i < CLASSES && !strcmp(classes[i].name, name); i++) sum += classes[i].count;
    fprintf(out, "%" PRIu64, sum);
  }
  fprintf(out, "}}\n");
  fflush(out);
}

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

__attribute__((visibility("default"))) int qemu_plugin_install(id_t_ id, const info_t_ *info, int argc, char **argv) {
  for (int i = 0; i < argc; i++)
    if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
  if (!out || strcmp(info->target_name, "aarch64")) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
