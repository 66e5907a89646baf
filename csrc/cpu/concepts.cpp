// concepts: the pixels of every unit's mask under every label of an image, and how many pixels each
// label has. An image's labels become bit masks once; of a unit that is above its threshold
// somewhere, only the pixels that a position above it reaches are up-sampled, straight into bits,
// and what the two have in common is counted word by word.
//
// The up-sampled value is a + f (b - a), along the row and then between rows, each operation
// rounded by itself (this file is compiled without contraction): it is never above the larger of
// the two, so that pixels out of reach need no look, and the same on every machine.
#include "above.h"
#include "pixels.h"

namespace fxk {
namespace FXK_ISA {
namespace {

constexpr int64_t kUnits = 64;  // whose positions are looked over together: units contiguous

template <class F>
struct Largest {
  static constexpr F quarter = 0x1.fffffep+125f;
};
template <>
struct Largest<double> {
  static constexpr double quarter = 0x1.fffffffffffffp+1021;
};

// Pixels of one label in one layer of the image.
struct Region {
  int64_t layer, label, category;  // the category is -1 where there is none to count
  int64_t begin, end;              // rows
};

// What all threads read.
template <class F>
struct Plan {
  const F* along;  // [out_width], and as many more as a group has

  const int32_t *first_x, *first_y;  // [width + 1], [height + 1]: first pixel at or after each
  int64_t words;                     // of a row
  int64_t stride;                    // of up-sampled lines: a group more than a row has
  int64_t regions;                   // that an image can have at most
  bool shared;                       // the results are other threads' too
};

// A thread's own. Bits lie word after word of a row, [words, out_height], so that the rows of a
// word are neighbours.
template <class F>
struct Room {
  uint64_t *unit, *labels;  // [words, out_height], [regions, words, out_height]
  uint64_t* columns;        // [regions, words]: pixels of a word that a region has in any row
  Region* regions;
  F *map, *lines;             // [height * width, up to whole groups], [height, stride]
  int64_t *region_of, *seen;  // [label_count], [category_count]
  int* above;                 // [kUnits]
  int64_t count, turn;        // regions of this image, units so far
};

template <class T>
void place(T** pointer, int64_t count, char* memory, size_t* at) {
  if (memory != nullptr) *pointer = reinterpret_cast<T*>(memory + *at);
  *at += align64(sizeof(T) * (size_t)count);
}

// One piece of memory for all that a room has; without one, how large it has to be.
template <class F>
size_t furnish(const ConceptArgs& a, const Plan<F>& plan, char* memory, Room<F>* room) {
  size_t at = 0;
  const int64_t bits = plan.words * a.out_height;
  place(&room->unit, bits, memory, &at);
  place(&room->map, a.height * a.width + kGroup, memory, &at);
  place(&room->lines, a.height * plan.stride, memory, &at);
  place(&room->region_of, a.label_count, memory, &at);
  place(&room->seen, a.category_count, memory, &at);
  place(&room->above, kUnits, memory, &at);
  place(&room->regions, plan.regions, memory, &at);
  place(&room->columns, plan.regions * plan.words, memory, &at);
  place(&room->labels, plan.regions * bits, memory, &at);  // last: most of it is never touched
  if (memory == nullptr) return at;
  for (int64_t c = 0; c < a.label_count; ++c) room->region_of[c] = -1;
  for (int64_t k = 0; k < a.category_count; ++k) room->seen[k] = 0;
  room->count = room->turn = 0;
  return at;
}

FXK_INLINE int64_t category_of(const ConceptArgs& a, int64_t label) {
  const int64_t category = a.categories[label];
  return category >= 0 && category < a.category_count ? category : -1;
}

// The image's layers as regions; false where a label is unknown.
template <class L, class F>
bool pack(const ConceptArgs& a, const Plan<F>& plan, const L* layers, Room<F>* room) {
  const int64_t bits = plan.words * a.out_height;
  room->count = 0;
  bool ok = true;
  for (int64_t layer = 0; ok && layer < a.layers; ++layer) {
    const int64_t before = room->count;
    ok = each_label(layers + layer * a.out_height * a.out_width, a.out_height, a.out_width,
                    a.label_count, [&](int64_t y, int64_t word, int64_t label, uint64_t pixels) {
                      int64_t k = room->region_of[label];
                      if (k < 0) {
                        k = room->region_of[label] = room->count++;
                        room->regions[k] = {layer, label, category_of(a, label), y, y};
                        memset(room->labels + k * bits, 0, sizeof(uint64_t) * (size_t)bits);
                        for (int64_t w = 0; w < plan.words; ++w)
                          room->columns[k * plan.words + w] = 0;
                      }
                      room->regions[k].end = y + 1;
                      room->columns[k * plan.words + word] |= pixels;
                      room->labels[k * bits + word * a.out_height + y] = pixels;
                    });
    // What another layer says of the same pixels is counted as well.
    for (int64_t k = before; k < room->count; ++k) room->region_of[room->regions[k].label] = -1;
  }
  return ok;
}

template <class F>
bool pack_image(const ConceptArgs& a, const Plan<F>& plan, int64_t image, Room<F>* room) {
  if (!known(a.labels + image * a.given, a.given, a.label_count)) return false;
  const int64_t at = image * a.layers * a.out_height * a.out_width;
  switch (a.mask_dtype) {
    case kUInt8: return pack(a, plan, static_cast<const uint8_t*>(a.masks) + at, room);
    case kInt16: return pack(a, plan, static_cast<const int16_t*>(a.masks) + at, room);
    default: return pack(a, plan, static_cast<const int32_t*>(a.masks) + at, room);
  }
}

// Rows and columns of pixels, from `begin` to before `end`.
struct Box {
  int64_t x_begin, x_end, y_begin, y_end;
};

// The bits of word `w` that are the pixels from `begin` to before `end`, which are some.
FXK_INLINE uint64_t between(int64_t begin, int64_t end, int64_t w) {
  const int64_t first = begin - w * kWord, last = end - 1 - w * kWord;
  return ~(uint64_t)0 << (first > 0 ? first : 0) & ~(uint64_t)0 >> (last < 63 ? 63 - last : 0);
}

// The pixels that a position above the threshold has a part in.
template <class F>
bool reach(const ConceptArgs& a, const Plan<F>& plan, F threshold, Room<F>* room, Box* box) {
  int64_t top = -1, bottom = 0, left = a.width, right = 0;
  for (int64_t p = 0; p < a.height * a.width; p += kGroup) {
    uint32_t bits = Between<F>::of(room->map + p, room->map + p).above(0, threshold);
    for (; bits != 0; bits &= bits - 1) {
      const int64_t at = p + __builtin_ctz(bits);
      if (top < 0) top = bottom = at / a.width;
      while ((bottom + 1) * a.width <= at) ++bottom;
      const int64_t column = at - bottom * a.width;
      left = column < left ? column : left;
      right = column > right ? column : right;
    }
  }
  if (top < 0) return false;
  *box = {plan.first_x[left > 0 ? left - 1 : 0], plan.first_x[right + 1],
          plan.first_y[top > 0 ? top - 1 : 0], plan.first_y[bottom + 1]};
  return box->x_begin < box->x_end && box->y_begin < box->y_end;
}

// The pixels of the box, in whole words, as bits; returns how many are above the threshold.
template <class F>
int64_t mark(const ConceptArgs& a, const Plan<F>& plan, const Box& box, F threshold,
             Room<F>* room) {
  const F* down = static_cast<const F*>(a.down);
  const int64_t start = box.x_begin / kGroup * kGroup;
  const int64_t groups_end = (box.x_end + kGroup - 1) / kGroup * kGroup;
  const int64_t stop = groups_end < a.out_width ? groups_end : a.out_width;
  const int64_t last_row = a.height - 1, last_column = a.width - 1;
  const int64_t lowest = a.rows[box.y_end - 1];
  for (int64_t r = a.rows[box.y_begin]; r <= (lowest < last_row ? lowest + 1 : last_row); ++r) {
    const F* row = room->map + r * a.width;
    F* line = room->lines + r * plan.stride;
    for (int64_t c = a.columns[start]; c <= a.columns[stop - 1]; ++c) {
      const int64_t begin = plan.first_x[c] > start ? plan.first_x[c] : start;
      const int64_t end = plan.first_x[c + 1] < stop ? plan.first_x[c + 1] : stop;
      const F left = row[c], step = row[c < last_column ? c + 1 : c] - left;
      // Whole groups: what is too much, the next column writes again.
      for (int64_t x = begin; x < end; x += kGroup)
        for (int k = 0; k < kGroup; ++k) line[x + k] = left + plan.along[x + k] * step;
    }
    for (int64_t x = stop; x < groups_end; ++x) line[x] = (F)NAN;  // above nothing
  }
  int64_t area = 0;
  for (int64_t word = start / kWord; word * kWord < stop; ++word) {
    uint64_t* bits = room->unit + word * a.out_height;
    const int64_t first = word * kWord > start ? word * kWord : start;
    const int64_t end = (word + 1) * kWord < groups_end ? (word + 1) * kWord : groups_end;
    for (int64_t r = a.rows[box.y_begin]; r <= lowest; ++r) {
      const int64_t y = plan.first_y[r] > box.y_begin ? plan.first_y[r] : box.y_begin;
      const int64_t until = plan.first_y[r + 1] < box.y_end ? plan.first_y[r + 1] : box.y_end;
      const F* upper = room->lines + r * plan.stride + first;
      const F* lower = room->lines + (r < last_row ? r + 1 : r) * plan.stride + first;
      mark_rows(upper, lower, down + y, until - y, threshold, (end - first) / kGroup, first % kWord,
                bits + y);
    }
    area += common_bits(bits + box.y_begin, bits + box.y_begin, box.y_end - box.y_begin);
  }
  return area;
}

// The map as numbers that can be up-sampled, and a group more; false where one is undefined.
template <class S, class F>
FXK_INLINE bool take_map(const ConceptArgs& a, const S* x, int64_t stride, F* map) {
  constexpr F largest = Largest<F>::quarter;
  int undefined = 0;
#pragma omp simd reduction(| : undefined)
  for (int64_t p = 0; p < a.height * a.width; ++p) {
    const F value = load(x + p * stride);
    undefined |= value != value;
    map[p] = value > largest ? largest : value < -largest ? -largest : value;
  }
  for (int k = 0; k < kGroup; ++k) map[a.height * a.width + k] = (F)NAN;  // above nothing
  return !undefined;
}

template <class S>
void add_unit(const ConceptArgs& a, const Plan<typename Compute<S>::type>& plan, const S* x,
              int64_t image, int64_t unit, Room<typename Compute<S>::type>* room) {
  using F = typename Compute<S>::type;
  const F threshold = static_cast<const F*>(a.thresholds)[unit];
  if (!(a.stride_p == 1 ? take_map(a, x, 1, room->map) : take_map(a, x, a.stride_p, room->map)))
    return;
  Box box;
  if (!reach(a, plan, threshold, room, &box)) return;
  const int64_t area = mark(a, plan, box, threshold, room);
  if (area == 0) return;
  const int64_t turn = ++room->turn;
  int64_t* intersections = a.intersections + unit * a.label_count;
  int64_t layer = -1, left = 0;  // pixels whose label in this layer is yet to be found
  for (int64_t k = 0; k < room->count; ++k) {
    const Region& region = room->regions[k];
    if (region.layer != layer) {
      layer = region.layer;
      left = area;
    }
    if (left == 0) continue;
    const int64_t begin = region.begin > box.y_begin ? region.begin : box.y_begin;
    const int64_t end = region.end < box.y_end ? region.end : box.y_end;
    const uint64_t* pixels = room->labels + k * plan.words * a.out_height;
    int64_t common = 0;
    for (int64_t w = box.x_begin / kWord; w * kWord < box.x_end && begin < end; ++w) {
      if (!(room->columns[k * plan.words + w] & between(box.x_begin, box.x_end, w))) continue;
      const int64_t at = w * a.out_height + begin;
      common += common_bits(room->unit + at, pixels + at, end - begin);
    }
    if (common == 0) continue;
    left -= common;
    add(intersections + region.label, common, plan.shared);
    if (region.category >= 0) room->seen[region.category] = turn;
  }
  for (int64_t s = 0; s < a.given; ++s) {
    const int64_t label = a.labels[image * a.given + s];
    if (label == 0) continue;
    add(intersections + label, area, plan.shared);
    const int64_t category = category_of(a, label);
    if (category >= 0) room->seen[category] = turn;
  }
  for (int64_t k = 0; k < a.category_count; ++k)
    if (room->seen[k] == turn) add(a.areas + unit * a.category_count + k, area, plan.shared);
}

// Units [begin, end) of an image whose labels are packed: those above their threshold somewhere.
template <class S>
void add_units(const ConceptArgs& a, const Plan<typename Compute<S>::type>& plan, int64_t image,
               int64_t begin, int64_t end, Room<typename Compute<S>::type>* room) {
  using F = typename Compute<S>::type;
  const S* base = static_cast<const S*>(a.activations) + image * a.stride_n;
  const F* thresholds = static_cast<const F*>(a.thresholds);
  const int64_t positions = a.height * a.width;
  if (a.stride_p == 1) {
    for (int64_t u = begin; u < end; ++u) {
      const S* x = base + u * a.stride_c;
      if (any_above(x, positions, thresholds[u])) add_unit<S>(a, plan, x, image, u, room);
    }
    return;
  }
  for (int64_t first = begin; first < end; first += kUnits) {
    const int64_t count = end - first < kUnits ? end - first : kUnits;
    int* above = room->above;
    for (int64_t k = 0; k < count; ++k) above[k] = 0;
    for (int64_t p = 0; p < positions; ++p) {
      const S* x = base + p * a.stride_p + first;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) above[k] |= load(x + k) > thresholds[first + k];
    }
    for (int64_t k = 0; k < count; ++k)
      if (above[k]) add_unit<S>(a, plan, base + first + k, image, first + k, room);
  }
}

// first[c]: the first output whose lower position is at least c.
void first_of(const int32_t* lower, int64_t out_length, int64_t length, int32_t* first) {
  int64_t x = 0;
  for (int64_t c = 0; c <= length; ++c) {
    while (x < out_length && lower[x] < c) ++x;
    first[c] = (int32_t)x;
  }
}

template <class S>
int64_t run(const ConceptArgs& a, int threads) {
  using F = typename Compute<S>::type;
  if (a.n == 0 || a.units == 0) return kOk;
  const size_t along = align64(sizeof(F) * (size_t)(a.out_width + kGroup));
  const size_t across = align64(sizeof(int32_t) * (size_t)(a.width + 1));
  Scratch scratch(along + across + sizeof(int32_t) * (size_t)(a.height + 1));
  if (!scratch.ok()) return kNoMemory;
  F* parts_along = scratch.as<F>();
  for (int64_t x = 0; x < a.out_width + kGroup; ++x)
    parts_along[x] = x < a.out_width ? static_cast<const F*>(a.along)[x] : 0;
  int32_t *first_x = scratch.as<int32_t>(along), *first_y = scratch.as<int32_t>(along + across);
  first_of(a.columns, a.out_width, a.width, first_x);
  first_of(a.rows, a.out_height, a.height, first_y);
  // A few images are shared between more threads, by units.
  const int64_t parts = a.n < threads ? (threads + a.n - 1) / a.n : 1;
  const int64_t units = (a.units + parts - 1) / parts, tasks = a.n * parts;
  const int n_threads = useful_threads(threads, a.n * a.units * a.height * a.width, tasks);
  const int64_t pixels = a.out_height * a.out_width;
  const int64_t labels = a.label_count - 1 < pixels ? a.label_count - 1 : pixels;
  const Plan<F> plan = {parts_along,
                        first_x,
                        first_y,
                        (a.out_width + kWord - 1) / kWord,
                        (a.out_width + 2 * kGroup - 1) / kGroup * kGroup,
                        a.layers * labels,
                        n_threads > 1};
  int64_t unknown = kOk;
  bool failed = false;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    Room<F> room{};
    Scratch own(furnish<F>(a, plan, nullptr, &room));
    if (own.ok()) {
      furnish<F>(a, plan, own.as<char>(), &room);
    } else {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t image = task / parts, begin = task % parts * units;
      if (!own.ok() || begin >= a.units) continue;
      if (pack_image(a, plan, image, &room))
        add_units<S>(a, plan, image, begin, begin + units < a.units ? begin + units : a.units,
                     &room);
      else
        note_image(&unknown, image);
    }
  }
  return failed ? kNoMemory : unknown;
}

template <class L>
int64_t run_areas(const LabelAreaArgs& a, int threads) {
  const int64_t pixels = a.height * a.width;
  const int n_threads = useful_threads(threads, a.n * a.layers * pixels, a.n);
  int64_t unknown = kOk;
  bool failed = false;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    const size_t counts = align64(sizeof(int64_t) * (size_t)a.label_count);
    Scratch own(counts);
    int64_t* found = own.as<int64_t>();
    if (own.ok()) {
      memset(found, 0, counts);
    } else {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t image = 0; image < a.n; ++image) {
      if (!own.ok()) continue;
      const int64_t* labels = a.labels + image * a.given;
      bool ok = known(labels, a.given, a.label_count);
      for (int64_t s = 0; ok && s < a.given; ++s) found[labels[s]] += pixels;
      for (int64_t layer = 0; ok && layer < a.layers; ++layer)
        ok = each_label(static_cast<const L*>(a.masks) + (image * a.layers + layer) * pixels,
                        a.height, a.width, a.label_count,
                        [&](int64_t, int64_t, int64_t label, uint64_t bits) {
                          found[label] += popcount(bits);
                        });
      if (!ok) note_image(&unknown, image);
    }
    if (own.ok())
      for (int64_t c = 1; c < a.label_count; ++c)
        if (found[c]) add(a.areas + c, found[c], n_threads > 1);
  }
  return failed ? kNoMemory : unknown;
}

}  // namespace

int64_t concepts(const ConceptArgs& a, int threads) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a, threads);
    case kFloat64: return run<double>(a, threads);
    case kBFloat16: return run<BFloat16>(a, threads);
    default: return run<Float16>(a, threads);
  }
}

int64_t label_areas(const LabelAreaArgs& a, int threads) {
  switch (a.mask_dtype) {
    case kUInt8: return run_areas<uint8_t>(a, threads);
    case kInt16: return run_areas<int16_t>(a, threads);
    default: return run_areas<int32_t>(a, threads);
  }
}

}  // namespace FXK_ISA
}  // namespace fxk
