// Small matrices whose rows are whole vectors, with zeros behind the last number; included after vectors.h, once for each
// instruction set.

constexpr int kTile = 4;  // rows of a tile of a product
constexpr float kOne = 1.0f;

static inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
static inline Vec& vec(float* at) { return *reinterpret_cast<Vec*>(at); }
static inline const Vec& vec(const float* at) { return *reinterpret_cast<const Vec*>(at); }

static inline IntVec lanes_from(int64_t first) {
  IntVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<int32_t>(first + i);
  return lanes;
}

// The left factor of a product: (i, j) at data[i * row + j * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// What a product is added to: the rows of data, each times its factor; nothing by default.
struct Addend {
  const float* data = nullptr;
  const float* factor = nullptr;
  int64_t next = 0;  // from a row's factor to the next row's
};

enum class Part { kWhole, kLower, kUpper };  // of the left factor: the rest is zero

// The V vectors at `column` of kTile rows from `row` on; the left factor's columns are first ... last - 1.
template <int V>
static inline void multiply_tile(float* out, int64_t width, int64_t row, int64_t column, int64_t first, int64_t last,
                                 Left left, const float* right, Addend addend) {
  Vec sum[kTile][V];
  const int64_t at = row * width + column;
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[i][v] = addend.data == nullptr
                      ? Vec{}
                      : vec(addend.data + at + i * width + v * kLanes) * addend.factor[(row + i) * addend.next];
  left.data += row * left.row + first * left.column;
  right += first * width + column;
  for (int64_t j = first; j < last; ++j, left.data += left.column, right += width)
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] += left.data[i * left.row] * vec(right + v * kLanes);
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) vec(out + at + i * width + v * kLanes) = sum[i][v];
}

// out = addend + left right, (rows, width) from (rows, depth) and (depth, width). Whole tiles of rows are written.
static void multiply(float* out, int64_t width, int64_t rows, int64_t depth, Left left, const float* right,
                     Addend addend = {}, Part part = Part::kWhole) {
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t first = part == Part::kUpper ? i : 0, last = part == Part::kLower ? i + kTile : depth;
    int64_t c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes)
      multiply_tile<2>(out, width, i, c, first, last, left, right, addend);
    if (c < width) multiply_tile<1>(out, width, i, c, first, last, left, right, addend);
  }
}

// to (columns, rows) = from (rows, columns) transposed, both in whole vectors.
static void transpose_rows(float* to, const float* from, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes)
      transpose(from + i * columns + j, columns, to + j * rows + i, rows);
}

// to = rows, each times a number.
static void scale_rows(float* to, const float* from, int64_t rows, int64_t width, const float* numbers) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += kLanes) vec(to + i * width + c) = vec(from + i * width + c) * numbers[i];
}
